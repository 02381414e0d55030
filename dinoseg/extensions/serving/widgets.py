"""Widgets of the app, which take only valid values of a visitor."""

from collections.abc import Callable, Sequence
from typing import Any

from nicegui import ui
from nicegui.element import Element
from nicegui.events import GenericEventArguments


class Component(Element):
    """Element of a Vue component of the app."""

    def show(self, **props: Any) -> None:
        """Set properties of the component."""
        self._props.update(props)
        self.update()


class Stage(Component, component="stage.js"):
    """The drop zone, the image with its mask and brush, and the labelled video."""


class Slider(ui.slider):
    """A slider that takes numbers of its range only."""

    def _event_args_to_value(self, e: GenericEventArguments) -> float:
        if not isinstance(e.args, int | float):
            return self.value
        return min(max(self.props["min"], e.args), self.props["max"])


class Switch(ui.switch):
    """A switch that takes true and false only."""

    def _event_args_to_value(self, e: GenericEventArguments) -> bool:
        return e.args is True


class Checkbox(ui.checkbox):
    """A checkbox that takes true and false only."""

    def _event_args_to_value(self, e: GenericEventArguments) -> bool:
        return e.args is True


def add_button(text: str, on_click: Callable[[], Any], props: str = "") -> ui.button:
    """Add a button."""
    return ui.button(text, on_click=on_click).props(f"no-caps {props}")


def add_slider(
    text: str, low: int, high: int, on_change: Callable[[], Any], shown: Sequence[int] | None = None
) -> Slider:
    """Add a slider below its text, in which {} is the value, or the entry of `shown` that it counts."""
    label = ui.label().classes("quiet")
    slider = Slider(min=low, max=high, value=low, on_change=on_change)
    label.bind_text_from(slider, "value", lambda value: text.format(value if shown is None else shown[int(value)]))
    return slider.props(f'aria-label="{text.partition(":")[0]}"')
