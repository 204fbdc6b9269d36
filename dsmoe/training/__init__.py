"""The training loop in prose and what it stands on: preparation, engine adapter, EMA, telemetry."""
