"""What tests share: drivers that fail or watch, small models, models of the cache's books."""
