"""Reading of request bodies, with a limit on their size."""

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive

from dinoseg.serving.limits import MIB, Refused, not_stored

_CHARSETS = ("utf-8", "us-ascii", "iso-8859-1")  # accepted charsets of form names


def bounded(request: Request, mib: float) -> Request:
    """Wrap a request, so that it is refused once its received or announced length exceeds a number of MiB.

    Raises:
        Refused: if the announced length is too large; received bytes are checked while the request is read.
    """
    most = int(mib * MIB)
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > most:
        raise _too_long(mib)
    return Request(request.scope, _counted(request.receive, mib, most))


async def read_upload(request: Request) -> bytes:
    """Return the single file of a multipart form, or else the whole body.

    Raises:
        Refused: if a form holds no file or several, or cannot be read.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        return await request.body()
    charset = parameters.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in _CHARSETS:  # some codecs raise other errors, or take quadratic time
        known = ", ".join(_CHARSETS)
        raise Refused(400, "one_file", f"The form has charset={charset!r:.40}; supported: {known}. Leave it out.")
    try:
        async with request.form(max_files=2, max_fields=8) as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            if len(files) != 1:
                raise _not_one_file(f"has {len(files)} files")
            return await files[0].read()
    except HTTPException as error:
        raise _not_one_file(f"cannot be read ({error.detail.rstrip('.')})") from error
    except OSError as error:  # Starlette stores more than a MiB in a file
        raise not_stored(error) from error


def _not_one_file(what: str) -> Refused:
    return Refused(400, "one_file", f"The form {what}; one file is needed. Send one: curl -F image=@FILE.")


def _too_long(mib: float) -> Refused:
    return Refused(413, "max_bytes", f"The request is longer than {mib:g} MiB. Send a smaller file.")


def _counted(receive: Receive, mib: float, most: int) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise _too_long(mib)
        return message

    return counted
