"""Hostile uploads end in the process that decodes them: at a deadline, within its memory, or when the server stops."""

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from child_functions import stuck
from films import write_slow_sound
from PIL import Image
from serving_stand_ins import FACTS, Bright, InThread, encoded, picture

from dinoseg.data.video.length import count_frames
from dinoseg.export.runtime.model import Model
from dinoseg.inference.video_file import VideoReader
from dinoseg.inference.video_writer import VideoWriter
from dinoseg.serving import clips, decoding
from dinoseg.serving import service as service_module
from dinoseg.serving.clips import ClipReader
from dinoseg.serving.decoding import Decoders
from dinoseg.serving.limits import ClipLimits, Limits, Refused
from dinoseg.serving.service import Service
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import as_rgb


@pytest.fixture
def one_decoder():
    made = Decoders(10_000, count=1)
    yield made
    made.end()


def decoded(decoders, data, admit=lambda pixels: None):
    return decoders.decode(data, 10_000, admit)


GOOD = encoded(picture())


def refusal(decoders, data=GOOD, **options):
    with pytest.raises(Refused) as error:
        decoded(decoders, data, **options)
    return error.value.rule


def test_what_takes_too_long_is_killed_and_the_next_image_is_decoded(one_decoder, monkeypatch):
    assert (decoding.PROCESSES, decoding.SECONDS, clips.SECONDS) == (4, 10, 10)  # as docs/security.md says
    real = decoding.decode_images
    monkeypatch.setattr(decoding, "decode_images", stuck)
    late = Decoders(10_000, seconds=3.0, count=1)
    begun = []

    def admit(pixels):
        begun.append(pixels)
        monkeypatch.setattr(decoding, "decode_images", real)

    try:
        assert refusal(late, admit=admit) == "decode_time" and begun == [1]
        monkeypatch.setattr(late, "_seconds", 60)
        assert (decoded(late, GOOD) == picture()).all()
    finally:
        late.end()
    assert refusal(one_decoder, admit=lambda pixels: (_ for _ in ()).throw(Refused(503, str(pixels), ""))) == "24"
    assert (decoded(one_decoder, encoded(picture(8, 9), "WEBP", lossless=True)) == picture(8, 9)).all()
    one_decoder.end()
    assert refusal(one_decoder) == "busy"


def test_neither_a_dead_process_nor_unread_answers_cost_the_next_image(one_decoder, monkeypatch):
    one_decoder._idle.queue[0].kill()
    assert (decoded(one_decoder, GOOD) == picture()).all()
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "_answer", lambda child: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            decoded(one_decoder, encoded(picture(5, 5)))
    assert (decoded(one_decoder, GOOD) == picture()).all()


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not bound memory")
def test_memory_of_decoding_is_bounded(monkeypatch):
    monkeypatch.setattr(decoding, "_MORE", 2**23)
    monkeypatch.setattr(decoding, "_BYTES_PER_PIXEL", 0)
    decoders = Decoders(2**22, count=1)
    try:
        with pytest.raises(Refused) as error:
            decoders.decode(encoded(Image.new("RGB", (2000, 2000))), 2**22, lambda pixels: None)
        assert error.value.rule == "decode_memory"
    finally:
        decoders.end()


def test_memory_is_given_by_pixels(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(decoding, "Child", lambda function, memory: given.append(memory))
    monkeypatch.setattr(clips, "Child", lambda function, memory: given.append(memory))
    Decoders(1000, count=1)
    ClipReader(tmp_path / "a.mp4", ClipLimits(), 1000)
    assert given == [40 * 1000 + 2**28, 64 * 1000 + 2**29]  # as docs/security.md says


def test_what_is_no_use_is_never_decoded(monkeypatch):
    monkeypatch.setattr(decoding, "decode", lambda data: pytest.fail("decoded"))
    frames = [Image.new("L", (2, 2), 9 * number) for number in range(2)]
    animated = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    for data, rule in (
        (encoded(picture(200, 200)), "max_pixels"),
        (animated, "one_frame"),
        (encoded(picture(), "GIF"), "format"),
    ):
        asked, sent = [({"max_pixels": 10_000}, data), None], []
        channel = SimpleNamespace(receive=lambda asked=asked: asked.pop(0), send=sent.append)
        decoding.decode_images(channel)
        assert [answer["refused"][1] for answer in sent] == [rule]


def test_a_file_of_many_frames_is_refused_without_reading_them(monkeypatch):
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.n_frames", property(lambda image: pytest.fail("counted")))
    frames = [Image.new("L", (2, 2))] * 3
    with pytest.raises(Refused, match="has several frames"):
        decoding.measure(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), 10_000)


def test_seconds_after_a_signal_nothing_is_decoded_any_more(monkeypatch):
    monkeypatch.setattr(service_module, "_LAST_DECODED", 0.01)
    monkeypatch.setattr(service_module, "Decoders", lambda max_pixels: Decoders(max_pixels, count=1))
    stopped = threading.Event()
    made = Service(Model(Bright(), FACTS), Limits(), batch_size=1, wait=0)
    made.at_stop = stopped.set
    made.announce_stop()
    assert stopped.wait(120)
    while refusal(made._decoders) != "busy":
        time.sleep(0.01)
    made.close()


def packets_without_frames(path, count):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        for number in range(count):
            packet = av.Packet(b"\0")
            packet.stream, packet.pts, packet.dts = stream, number, number
            container.mux(packet)
    return path


def test_packets_without_frames_are_bounded(tmp_path, monkeypatch):
    path = packets_without_frames(tmp_path / "a.mkv", 60)
    monkeypatch.setattr("dinoseg.data.video.decoder._MAX_SILENT", 50)
    with pytest.raises(UserError, match="a.mkv has 50 packets in a row without a frame"):
        VideoReader(path)
    assert count_frames(path) == 0
    monkeypatch.setattr(clips, "Child", InThread)
    with (
        pytest.raises(UserError, match="has more than 20 packets"),
        ClipReader(path, ClipLimits(max_seconds=0.01), 10**6),
    ):
        pass


def test_frames_come_from_a_process_as_they_are(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 10.0, (32, 48)) as writer:
        for number in range(3):
            writer.write(np.full((32, 48, 3), 80 * number, np.uint8))
    with VideoReader(tmp_path / "a.mp4") as reader, ClipReader(tmp_path / "a.mp4", ClipLimits(), 2000) as clip:
        assert (clip.size, clip.count, clip.rate) == (reader.size, reader.count, reader.rate)
        assert clip.traits == replace(reader.traits, sound=None)
        for (frame, time_), (wanted, shown) in zip(clip.timed(), reader.timed(), strict=True):
            assert (frame == wanted).all() and time_ == shown


@pytest.mark.parametrize(("rate", "heard"), [(8000, True), (20, False)])
def test_sound_of_a_clip_is_encoded_by_its_process(tmp_path, rate, heard):
    path = write_slow_sound(tmp_path / "a.avi", rate)
    with (
        ClipReader(path, ClipLimits(), 10**4, sound=True) as clip,
        VideoWriter(tmp_path / "out.mp4", clip.rate, clip.size, like=clip.traits) as writer,
    ):
        assert not isinstance(clip.traits.sound, Path), "this process opens no file of a client"
        for frame, time_ in clip.timed():
            writer.write(frame, time_)
    with av.open(str(tmp_path / "out.mp4")) as copy:
        assert len(copy.streams.audio) == heard and copy.streams.video[0].frames == 24
        if heard:
            assert 0.9 < copy.streams.audio[0].duration * copy.streams.audio[0].time_base < 1.1
            assert sum(frame.samples for frame in copy.decode(audio=0)) >= 7000


def test_sound_of_a_clip_ends_at_its_longest_length(tmp_path):
    path = write_slow_sound(tmp_path / "a.avi", 8000, frames=72)
    with ClipReader(path, ClipLimits(max_seconds=1), 10**4, sound=True) as clip:
        assert sum(1 for _ in clip.timed()) == 72
        assert 8 <= len(clip.traits.sound.packets) <= 10  # of 1024 samples, 8000 a second


def test_who_waits_for_a_frame_is_woken_when_the_work_is_cancelled(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "Child", InThread)
    monkeypatch.setattr(clips, "send_frames", lambda channel: [channel.receive(), channel.receive()])
    reader = ClipReader(tmp_path / "a.mp4", ClipLimits(), 2000)
    threading.Timer(0.05, reader.kill).start()
    with pytest.raises(UserError, match="crashed its decoder process"), reader:
        pass


def test_a_clip_that_is_not_decoded_in_time_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "SECONDS", 60.0)
    monkeypatch.setattr(clips, "send_frames", stuck)
    reader = ClipReader(tmp_path / "a.mp4", ClipLimits(), 1)
    try:
        reader._next({})
        assert reader._child.is_alive
        monkeypatch.setattr(clips, "SECONDS", 0.1)
        with pytest.raises(UserError, match=r"is not decoded within 0.1 s"):
            reader._next()
        assert not reader._child.is_alive
    finally:
        reader.__exit__()


def test_a_damaged_image_is_refused_as_in_this_process(one_decoder):
    data = encoded(picture(64, 64))[:-2000]
    assert refusal(one_decoder, data) == "unreadable"
    with pytest.raises(UserError), decoding._opened(data) as image:
        as_rgb(image, "The image")
