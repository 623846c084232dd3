from .analysis.log import open_log as open_log
from .analysis.null.estimate import FitOptions as FitOptions
from .analysis.sweep.profile import Profile as Profile
from .capture.apps.notebook.logger import BHRoutingLogger as BHRoutingLogger
from .capture.contract.null.model import KdeModel as KdeModel
from .capture.observe import observe as observe
from .capture.observe import route as route
from .capture.session import load_model as load_model
