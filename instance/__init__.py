"""One process per GPU (or CPU share): the model, its scheduler, its steps and its server."""
