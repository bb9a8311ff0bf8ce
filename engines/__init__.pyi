from .twin import Twin as Twin
from .twin import Work as Work
