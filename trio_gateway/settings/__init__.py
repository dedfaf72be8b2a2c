"""Settings: read once from the environment and ``.env``, then frozen."""

from .loading import NAMES as NAMES
from .loading import load_settings
from .settings import DEVELOPMENT_SECRET as DEVELOPMENT_SECRET
from .settings import SECTOR_COLUMNS as SECTOR_COLUMNS
from .settings import InvalidSettings, Settings

__all__ = ["InvalidSettings", "Settings", "load_settings"]
