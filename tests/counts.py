"""Numbers of parameters."""


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())
