from .hyperparameters import Hyperparameters as Hyperparameters
from .hyperparameters import default_hyperparameters as default_hyperparameters
from .policy import AgentCard as AgentCard
from .policy import LearnedPolicy as LearnedPolicy
from .policy import load_agent as load_agent
from .training import train as train
