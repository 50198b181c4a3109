"""`python -m dlm_ray`: the same as `dlm-ray`."""

from dlm_ray.cli.main import main

main()
