"""`python -m mim_refiner_hf.cli`, and `accelerate launch -m mim_refiner_hf.cli refine`: the console command as a module."""

from .main import main

if __name__ == "__main__":
    raise SystemExit(main())
