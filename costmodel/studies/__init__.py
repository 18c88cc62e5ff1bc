"""Studies: the tables behind the notebooks, as pandas DataFrames with units in the column names.

:mod:`costmodel.figures` draws them.
"""
