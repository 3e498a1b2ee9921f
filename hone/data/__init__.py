"""What a team has, as rows: files found, read in bounded memory, recognised, and checked row by row.

files.py    paths, folders, globs and object store URIs -> the files behind them
readers.py  one file -> its raw rows, numbered
formats.py  a raw row -> a row of one shape (chat, labelled text, ...), or a DataError that says what is wrong with it
messages.py the conversations among them
"""
