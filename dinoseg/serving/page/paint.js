// A mask painted on a picture: a byte a pixel, 0 = background, 1.. = objects.

const REMEMBERED = 20; // strokes that can be undone

export class Painter {
  // `changed` is called when something was painted; colours[id] = [red, green, blue]
  constructor(canvas, colours, changed) {
    Object.assign(this, { canvas, colours, changed, ids: null, object: 1, count: 1, erasing: false, size: 20 });
    this.strokes = [];
    this.cross = null;
    this.last = null;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (this.last = null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  begin(picture) {
    this.picture = picture;
    this.ids = new Uint8Array(picture.width * picture.height);
    this.tint = new ImageData(picture.width, picture.height);
    this.layer = new OffscreenCanvas(picture.width, picture.height);
    Object.assign(this, { strokes: [], object: 1, count: 1, erasing: false, cross: null });
    this.size = Math.max(4, Math.round(Math.min(picture.width, picture.height) / 12));
    this.canvas.width = picture.width;
    this.canvas.height = picture.height;
    this.canvas.classList.add("painting");
  }

  end() {
    this.picture = null;
    this.canvas.classList.remove("painting");
  }

  get on() {
    return Boolean(this.picture);
  }

  draw(opacity) {
    const pen = this.canvas.getContext("2d");
    this.layer.getContext("2d").putImageData(this.tint, 0, 0);
    pen.drawImage(this.picture, 0, 0);
    pen.globalAlpha = opacity;
    pen.drawImage(this.layer, 0, 0);
    pen.globalAlpha = 1;
    if (this.cross) {
      const [x, y] = this.cross;
      for (const [colour, width] of [["#000", 3], ["#fff", 1.5]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = (width * this.canvas.width) / this.canvas.clientWidth;
        pen.beginPath();
        pen.arc(x, y, this.size / 2, 0, 7);
        pen.stroke();
      }
    }
  }

  undo() {
    if (!this.strokes.length) return;
    this.ids = this.strokes.pop();
    this.#colour(0, 0, this.canvas.width, this.canvas.height);
    this.changed();
  }

  #remember() {
    this.strokes.push(this.ids.slice());
    if (this.strokes.length > REMEMBERED) this.strokes.shift();
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  #down(event) {
    if (!this.on || event.button) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#remember();
    this.cross = this.last = this.#at(event);
    this.#line(this.last, this.last);
  }

  #move(event) {
    if (!this.on) return;
    const here = this.#at(event);
    this.cross = here;
    if (this.last) {
      this.#line(this.last, here);
      this.last = here;
    } else {
      this.changed();
    }
  }

  #key(event) {
    if (!this.on) return;
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const { width, height } = this.canvas;
    this.cross ??= [width / 2, height / 2];
    if (way) {
      const step = Math.max(1, this.size / (event.shiftKey ? 1 : 4));
      const from = this.cross;
      this.cross = [0, 1].map((axis) => Math.min(Math.max(from[axis] + way[axis] * step, 0), [width, height][axis]));
      this.changed();
    } else if (event.key === " ") {
      this.#remember();
      this.#line(this.cross, this.cross);
    } else {
      return;
    }
    event.preventDefault();
  }

  // paint what is within half a brush of the way from one point to another
  #line([x0, y0], [x1, y1]) {
    const { width, height } = this.canvas;
    const [radius, id] = [this.size / 2, this.erasing ? 0 : this.object];
    const [left, right] = reach(x0, x1, radius, width);
    const [top, bottom] = reach(y0, y1, radius, height);
    const [dx, dy] = [x1 - x0, y1 - y0];
    const long = dx * dx + dy * dy;
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        const [px, py] = [x + 0.5 - x0, y + 0.5 - y0];
        const share = long ? Math.min(Math.max((px * dx + py * dy) / long, 0), 1) : 0;
        if (Math.hypot(px - share * dx, py - share * dy) <= radius) this.ids[y * width + x] = id;
      }
    }
    this.#colour(left, top, right, bottom);
    this.changed();
  }

  #colour(left, top, right, bottom) {
    const words = new Uint32Array(this.tint.data.buffer);
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        const at = y * this.canvas.width + x;
        words[at] = this.ids[at] ? opaque(this.colours[this.ids[at]]) : 0;
      }
    }
  }
}

// a colour as canvases hold it, in one number
export const opaque = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

// the pixels from one end to the other, a radius further on both sides, as far as there are any
function reach(from, to, radius, length) {
  const [low, high] = [Math.min(from, to) - radius, Math.max(from, to) + radius];
  return [Math.max(0, Math.floor(low)), Math.min(length, Math.ceil(high))];
}
