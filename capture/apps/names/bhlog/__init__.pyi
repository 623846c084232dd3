from .analysis import *
from .capture import *
