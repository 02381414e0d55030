"""Functions that break down in the middle, as a full disk makes them."""


def fail_after(patch, module, name, count, error):
    """Let a module's function work so many times, and raise an error from then on."""
    real = getattr(module, name)
    left = [count]

    def call(*given, **named):
        if not left[0]:
            raise error
        left[0] -= 1
        return real(*given, **named)

    patch.setattr(module, name, call)
