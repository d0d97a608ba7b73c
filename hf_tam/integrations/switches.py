"""The environment variables that registration heeds. Imported at the start of every Python in an activated one."""

ANNOUNCE_VARIABLE = "HF_TAM_ANNOUNCE"
"""1: say what was registered; 0: it has been said."""
KILL_SWITCH = "HF_TAM_AUTOLOAD"
"""0: register nothing."""
