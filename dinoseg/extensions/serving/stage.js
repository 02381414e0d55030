// The drop zone and, below it, the image with its mask and brush, or the labelled video.
export default {
  template: `
    <section class="stage" :class="{over}" @dragover.prevent="over = true" @dragleave="over = false" @drop.prevent="drop">
      <label class="drop" :class="{small: small || image}">
        <input type="file" accept="image/*,video/*" :disabled="busy || sent !== null" @change="choose">
        <strong>{{ title }}</strong>
        <span>or choose a file: {{ hint }}</span>
        <progress v-if="sent !== null" :value="sent"></progress>
      </label>
      <video v-if="video && !folded" :src="video" controls autoplay loop muted playsinline></video>
      <div v-else-if="image && !folded" class="scroll">
        <div class="view" :style="{width: 'calc(min(100%, 72vh * ' + width / height + ') * ' + zoom + ')'}">
          <img :src="image" draggable="false" alt="The image">
          <img :src="mask" draggable="false" alt="Its classes" class="mask" :style="{opacity}" @load="strokes = []">
          <svg ref="svg" :viewBox="'0 0 ' + width + ' ' + height" :class="{paint}" @pointerdown="down"
               @pointermove="move" @pointerup="up" @pointercancel="up" @pointerleave="cursor = null">
            <g fill="none" stroke-linecap="round" stroke-linejoin="round" :opacity="opacity">
              <polyline v-for="line in visible" :points="line.points.join(' ')" :stroke="line.color" :stroke-width="line.width"/>
            </g>
            <g v-if="paint && cursor" fill="none">
              <circle v-for="[ink, wide] in [['#000', 3], ['#fff', 1.5]]" :cx="cursor[0]" :cy="cursor[1]" :r="radius"
                      :stroke="ink" :stroke-width="wide" vector-effect="non-scaling-stroke"/>
            </g>
          </svg>
        </div>
      </div>
    </section>`,
  props: {
    url: String, hint: String, maxMib: Number, busy: Boolean, image: String, mask: String, video: String,
    width: Number, height: Number, zoom: Number, opacity: Number, paint: Boolean, color: String, radius: Number,
    title: { type: String, default: "Drop an image or a short video" }, small: Boolean, folded: Boolean,
  },
  data: () => ({ over: false, sent: null, cursor: null, stroke: null, strokes: [] }),
  computed: {
    visible() {
      return this.stroke ? [...this.strokes, this.stroke] : this.strokes;
    },
  },
  methods: {
    drop(event) {
      this.over = false;
      this.upload(event.dataTransfer.files[0]);
    },
    choose(event) {
      this.upload(event.target.files[0]);
      event.target.value = ""; // so that the same file can be chosen again
    },
    upload(file) {
      if (!file || this.busy || this.sent !== null) return;
      if (file.size > this.maxMib * 2 ** 20) return this.$emit("failed", `The file is larger than ${this.maxMib} MiB.`);
      const request = new XMLHttpRequest(); // fetch() reports no progress
      const end = (event, value) => {
        this.sent = null;
        this.$emit(event, value);
      };
      request.open("POST", this.url);
      request.responseType = "json";
      request.upload.onprogress = (event) => (this.sent = event.loaded / event.total);
      request.onload = () =>
        request.status < 300 ? end("uploaded", file.name) : end("failed", request.response?.detail ?? "Upload failed.");
      request.onerror = () => end("failed", "The server cannot be reached. Is it still running?");
      this.sent = 0;
      request.send(file);
    },
    at(event) {
      const box = this.$refs.svg.getBoundingClientRect();
      const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      return [Math.round(10 * x * this.width) / 10, Math.round(10 * y * this.height) / 10];
    },
    down(event) {
      if (!this.paint || this.busy || event.button) return;
      event.target.setPointerCapture(event.pointerId);
      const point = this.at(event);
      this.stroke = { points: [point, point], color: this.color, width: 2 * this.radius };
    },
    move(event) {
      this.cursor = this.at(event);
      if (this.stroke) this.stroke.points.push(this.cursor);
    },
    up() {
      if (!this.stroke) return;
      this.strokes.push(this.stroke); // shown until the mask that holds it is loaded
      this.$emit("stroke", this.stroke.points);
      this.stroke = null;
    },
  },
};
