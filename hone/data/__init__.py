"""What a team has, as rows: files found, read in bounded memory, recognised, and checked row by row.

files.py    paths, folders, globs and object store URIs -> the files behind them
parts.py    files -> parts of like size, for many processes
readers.py  one file -> its raw rows, numbered
formats.py  a raw row -> a row of one shape (chat, labelled text, ...), or a DataError that says what is wrong with it
messages.py the conversations among them
media.py    the pictures and sounds among them, decoded
rows.py     all of that together: checked rows, each with its place
gate.py     what a look at the rows finds; report.py how it is told; private.py the addresses, numbers and secrets among it
cache.py    what preparing rows has left on disk
"""
