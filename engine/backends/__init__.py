"""The two engines behind `engine.backend.Backend`."""
