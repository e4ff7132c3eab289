"""The worker: one engine, real or simulated, behind the Session contract."""
