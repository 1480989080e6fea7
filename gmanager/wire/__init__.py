"""What travels between processes, and how: messages, codec, channels, errors."""
