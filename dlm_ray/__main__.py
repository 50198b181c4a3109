"""Run the command line with `python -m dlm_ray`."""

from dlm_ray.cli.main import main

main()
