"""The page of `hf-tam report`: reads the folders of runs, draws them, and writes one self-contained HTML file."""
