"""The workbench, ``flatdepth serve``: a file per tab, and ``page`` that puts them together."""
