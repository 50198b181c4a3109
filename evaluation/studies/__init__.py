"""Studies: methods compared over seeds on real text, with paired tests and the minimum detectable effects."""
