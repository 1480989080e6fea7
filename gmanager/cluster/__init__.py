"""What the gManager decides: a state machine, pure. Events go in, actions come out; `gmanager.server` does what they say."""
