"""The console command as a module: `accelerate launch -m mim_refiner_hf.cli refine ...`."""

from .main import main

if __name__ == "__main__":
    raise SystemExit(main())
