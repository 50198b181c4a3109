"""Studies: arms x seeds on real text, with the statistics that say what was seen and what could not have been."""
