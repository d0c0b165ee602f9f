"""The web user interfaces: who may use them, and the processes that serve them."""
