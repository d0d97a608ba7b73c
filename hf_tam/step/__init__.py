"""One step, from the gradients to the parameters: `pipeline` tells it, the other modules are its parts."""
