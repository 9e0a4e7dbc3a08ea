"""The demonstration behind `make demo`: an agent is lost and brought back, for real, in half a minute."""
