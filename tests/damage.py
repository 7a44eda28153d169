"""Ways in which a file is damaged, drawn from a random generator."""


def truncate(draw, data):
    return data[: draw.randrange(len(data))]


def flip(draw, data):
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def zeros(draw, data):
    at = draw.randrange(len(data))
    length = min(len(data) - at, 512)
    return data[:at] + bytes(length) + data[at + length :]


def garbage(draw, data):
    return draw.randbytes(draw.randrange(1, 2000))


def cut_out(draw, data):
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.randrange(1, 300) :]


def append(draw, data):
    return data + draw.randbytes(draw.randrange(1, 100))


def not_text(draw, data):
    at = draw.randrange(len(data))
    return data[:at] + b"\xff\xfe" + data[at:]


def empty(draw, data):
    return b""


ALL = (truncate, flip, zeros, garbage, cut_out, append, not_text, empty)
SIZES = (truncate, garbage, cut_out, append, empty)  # those that a length or a header shows
# Those of text whose meaning is in every character: a flipped one may be another number, which is as good.
TEXT = (truncate, zeros, garbage, cut_out, not_text, empty)
