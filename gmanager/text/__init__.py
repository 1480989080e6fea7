"""Text to tokens and back, chat templates, and what holds an answer to a form."""
