"""What tests share: the exact oracle, the statistical assertions and the published numbers."""
