"""What analysis passes on of the contract, so that offline users import from one place."""

from bhlog.capture.contract.errors import AlreadyPatched as AlreadyPatched
from bhlog.capture.contract.errors import Corrupt as Corrupt
from bhlog.capture.contract.errors import CorruptKde as CorruptKde
from bhlog.capture.contract.errors import CorruptManifest as CorruptManifest
from bhlog.capture.contract.errors import CorruptProfile as CorruptProfile
from bhlog.capture.contract.errors import CorruptRun as CorruptRun
from bhlog.capture.contract.errors import CorruptShard as CorruptShard
from bhlog.capture.contract.errors import CorruptTrace as CorruptTrace
from bhlog.capture.contract.errors import EmptyText as EmptyText
from bhlog.capture.contract.errors import InvalidOption as InvalidOption
from bhlog.capture.contract.errors import KdeMismatch as KdeMismatch
from bhlog.capture.contract.errors import MissingExtra as MissingExtra
from bhlog.capture.contract.errors import MissingRun as MissingRun
from bhlog.capture.contract.errors import NewerLog as NewerLog
from bhlog.capture.contract.errors import RouterLogError as RouterLogError
from bhlog.capture.contract.errors import RunExists as RunExists
from bhlog.capture.contract.errors import UnknownIdentity as UnknownIdentity
from bhlog.capture.contract.errors import UnsafePickle as UnsafePickle
from bhlog.capture.contract.errors import UnsupportedModel as UnsupportedModel
from bhlog.capture.contract.errors import WriterFailed as WriterFailed
from bhlog.capture.contract.null.fit import FitOptions as FitOptions
from bhlog.capture.contract.null.model import KdeModel as KdeModel
from bhlog.capture.contract.rule import BhOptions as BhOptions
