"""Everything on Ray. The only folder that imports it."""
