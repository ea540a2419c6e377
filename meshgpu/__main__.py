"""`python -m meshgpu`: the command line."""

from meshgpu.cli.main import main

if __name__ == "__main__":
    main()
