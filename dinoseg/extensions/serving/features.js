// Rows of an image, the colours of its features, and the similarity of its patches to the clicked ones.
const color = (value) => {
  const v = Math.min(Math.max(value, 0), 1); // gnuplot's colours, whose lightness rises with the value
  return [Math.sqrt(v), v ** 3, Math.max(0, Math.sin(2 * Math.PI * v))].map((level) => Math.round(255 * level));
};
const stops = Array.from({ length: 21 }, (_, i) => `rgb(${color(i / 20)})`);

export default {
  template: `
    <section v-if="rows.length" class="stage features">
      <div v-for="(row, i) in rows" class="panels">
        <figure v-for="kind in ['image', 'colours', 'similarity']" :class="kind">
          <figcaption class="quiet">
            <span>{{ i && kind === "image" ? "Second image" : names[kind] }}</span>
            <span v-if="kind === 'similarity'" class="scale">0 <i :style="{background: gradient}"></i> 1</span>
          </figcaption>
          <div class="panel" :class="{clicked: !i}" :style="{aspectRatio: row.width + '/' + row.height}"
               @pointermove="cursor = at(i, $event)" @pointerleave="cursor = null" @click="click(i, $event)">
            <img v-if="kind === 'image'" :src="row.image" draggable="false" :alt="i ? 'The second image' : 'The image'">
            <img v-else-if="kind === 'colours'" :src="row.colours" :style="cover(row)" draggable="false" :alt="names[kind]">
            <canvas v-else-if="points.length" :ref="'map' + i" :style="cover(row)" :width="row.grid[1]" :height="row.grid[0]"></canvas>
            <span v-else class="quiet">Click a place in the image.</span>
            <svg :viewBox="'0 0 ' + row.width + ' ' + row.height">
              <g v-for="[x, y, mark] in marks(i)" :class="mark">
                <circle v-for="ink in ['outer', 'inner']" :class="ink" :cx="x" :cy="y" :r="size(row)" vector-effect="non-scaling-stroke"/>
              </g>
            </svg>
          </div>
        </figure>
        <p class="quiet">{{ text(i, row) }}</p>
      </div>
    </section>`,
  props: { rows: { type: Array, default: () => [] }, points: { type: Array, default: () => [] } },
  data: () => ({
    cursor: null, // {i, x, y} in pixels of an image
    values: [], // a Float32Array for each row
    best: [], // for each row, the middle of its most similar patch, in pixels, and its similarity
    names: { image: "Image", colours: "Principal components", similarity: "Cosine similarity" },
    gradient: `linear-gradient(to right, ${stops})`,
  }),
  watch: {
    rows: { handler: "load", immediate: true },
  },
  methods: {
    async load() {
      const rows = this.rows;
      const load = async (row) => new Float32Array(await (await fetch(row.cosines)).arrayBuffer());
      const values = await Promise.all(this.points.length ? rows.map(load) : []);
      if (rows !== this.rows) return; // replaced meanwhile
      this.values = values;
      this.best = values.map((each, i) => this.find(rows[i], each));
      await this.$nextTick();
      values.forEach((each, i) => this.draw(this.$refs["map" + i][0], rows[i], each));
    },
    find({ grid, seen: [down, across], width, height }, values) {
      const j = values.reduce((top, value, k) => (value > values[top] ? k : top), 0);
      const middle = (place, seen, length) => ((place + Math.min(place + 1, seen)) / 2 / seen) * length;
      return [middle(j % grid[1], across, width), middle(Math.floor(j / grid[1]), down, height), values[j]];
    },
    draw(canvas, { grid: [height, width] }, values) {
      const pixels = new ImageData(width, height);
      values.forEach((value, j) => pixels.data.set([...color(value), 255], 4 * j));
      canvas.getContext("2d").putImageData(pixels, 0, 0);
    },
    // the last patches may exceed the image
    cover: ({ grid: [height, width], seen: [down, across] }) => ({
      width: `${(100 * width) / across}%`,
      height: `${(100 * height) / down}%`,
    }),
    size: ({ width, height }) => Math.max(width, height) / 50,
    at(i, event) {
      const box = event.currentTarget.getBoundingClientRect();
      const { width, height } = this.rows[i];
      const inside = (share, length) => Math.min(Math.max(0, share * length), length - 0.01);
      const x = inside((event.clientX - box.left) / box.width, width);
      return { i, x, y: inside((event.clientY - box.top) / box.height, height) };
    },
    click(i, event) {
      const { x, y } = this.at(i, event);
      if (!i) this.$emit("point", [x, y]);
    },
    marks(i) {
      const { cursor } = this;
      return [
        ...(i ? [] : this.points.map(([x, y]) => [x, y, "point"])),
        ...(i && this.best[i] ? [[...this.best[i].slice(0, 2), "best"]] : []),
        ...(cursor?.i === i ? [[cursor.x, cursor.y, "cursor"]] : []),
      ];
    },
    text(i, row) {
      const values = this.values[i];
      if (!values) return "";
      const best = i ? `Best match: ${this.best[i][2].toFixed(3)}. ` : "";
      if (this.cursor?.i !== i) return `${best}Point at a picture to read its similarity.`;
      const { x, y } = this.cursor;
      const patch = (place, length, seen) => Math.floor(((Math.floor(place) + 0.5) * seen) / length);
      const column = patch(x, row.width, row.seen[1]);
      const value = values[patch(y, row.height, row.seen[0]) * row.grid[1] + column];
      return `${best}Similarity at x ${Math.floor(x)}, y ${Math.floor(y)}: ${value?.toFixed(3)}`;
    },
  },
};
