"""Training rows changed a little each time that they are seen: texts, pictures, sounds. Whoever calls brings the random numbers.

Each function is pure: the same generator state gives the same row, and what it was given stays as it was. With every setting at its
neutral value (0, or a range of (1, 1)) a row comes back as it is.
"""
