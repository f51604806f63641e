"""The keeper process: owns the memory that several workers on one device share, and who owns which block of it."""
