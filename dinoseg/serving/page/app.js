// The page: what is dropped goes to the server, and what comes back is drawn here.

import { Painter, opaque } from "./paint.js";

const $ = (id) => document.getElementById(id);
const POLL = 400; // milliseconds between two questions how far a clip is
const shown = { picture: null, ids: null, hidden: new Set(), changed: null };
let about, painter, layer;
let clip = null; // what the server says of the clip in hand
let turn = 0; // counts uploads: answers to an older one are dropped

// ---- asking the server

function ask(method, path, body, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, path);
    request.responseType = "json";
    if (onProgress) request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onload = () => {
      if (request.status < 300) resolve(request.response);
      else reject(new Error(request.response?.error?.message ?? `The server responded with status ${request.status}.`));
    };
    request.onerror = () => reject(new Error("The server cannot be reached. Is it still running?"));
    request.send(body);
  });
}

const bitmap = (blob) => createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });

// a PNG that came as text
const png = (text) => new Blob([Uint8Array.from(atob(text), (it) => it.charCodeAt(0))], { type: "image/png" });

function say(text, bad = false) {
  $("said").textContent = text;
  $("said").classList.toggle("bad", bad);
}

// one piece of work at a time; what it throws is told
async function work(name, task) {
  const mine = ++turn;
  say(name);
  $("working").hidden = false;
  $("progress").removeAttribute("value");
  try {
    await task(() => mine === turn);
  } catch (error) {
    if (mine === turn) say(error.message, true);
  } finally {
    if (mine === turn) $("working").hidden = true;
  }
}

function progress(share) {
  if (share < 1) $("progress").value = share;
  else $("progress").removeAttribute("value");
}

// ---- an image

async function openImage(file) {
  await work(`Segmenting ${file.name} ...`, async (current) => {
    $("cancel").hidden = true;
    const limit = about.image_mib * 2 ** 20;
    if (file.size > limit) throw new Error(`${file.name} is larger than ${about.image_mib} MiB.`);
    const [found, drawn] = await Promise.all([
      ask("POST", "app/image", file, progress),
      createImageBitmap(file).catch(() => null), // TIFF: no browser draws it
    ]);
    const ids = await bitmap(png(found.ids));
    if (!current()) return;
    const fits = drawn?.width === found.width && drawn?.height === found.height;
    showImage(fits ? drawn : null, ids, found);
    say(`${file.name}: ${found.width} x ${found.height} pixels, ${found.areas.length} classes found.`);
    if (!fits) say("Your browser cannot display this file type: only the classes are shown.");
    const stem = file.name.replace(/\.[^.]*$/, "");
    offer([[URL.createObjectURL(png(found.mask)), `${stem}_mask.png`, "Download mask"]]);
  });
}

function showImage(picture, mask, found) {
  const { width, height } = mask;
  resize(width, height);
  layer = new OffscreenCanvas(width, height);
  const pen = layer.getContext("2d", { willReadFrequently: true });
  pen.drawImage(mask, 0, 0);
  const levels = pen.getImageData(0, 0, width, height).data;
  shown.ids = new Uint8Array(width * height).map((_, at) => levels[4 * at]);
  shown.picture = picture;
  shown.hidden.clear();
  show("view");
  listAreas(found.areas, tint);
  $("look").hidden = false;
  tint();
}

// colour the mask's layer by what is not hidden, and draw
function tint() {
  const { width, height } = $("view");
  const colours = new Uint32Array(256);
  const whole = opacity() === 1 || !shown.picture;
  about.palette.forEach((colour, id) => {
    // black means "nothing here": it leaves the picture as it is
    const seen = !shown.hidden.has(id) && (whole || colour.some(Boolean));
    colours[id] = seen ? opaque(colour) : 0;
  });
  const pixels = new ImageData(width, height);
  const words = new Uint32Array(pixels.data.buffer);
  for (let at = 0; at < words.length; at++) words[at] = colours[shown.ids[at]];
  layer.getContext("2d").putImageData(pixels, 0, 0);
  draw();
}

function draw() {
  if (painter.on) return painter.draw(opacity());
  if (!shown.ids) return;
  const pen = $("view").getContext("2d");
  pen.clearRect(0, 0, $("view").width, $("view").height);
  if (shown.picture) pen.drawImage(shown.picture, 0, 0);
  pen.globalAlpha = shown.picture ? opacity() : 1;
  pen.drawImage(layer, 0, 0);
  pen.globalAlpha = 1;
}

// ---- a clip

async function openClip(file) {
  await work(`Uploading ${file.name} ...`, async (current) => {
    $("cancel").hidden = true;
    if (file.size > about.video_mib * 2 ** 20) throw new Error(`${file.name} is larger than ${about.video_mib} MiB.`);
    const taken = await ask("POST", "app/clip", file, progress);
    const answer = await fetch(`app/${taken.id}/frame.png`);
    if (!answer.ok) throw new Error("The clip has expired: send it again.");
    const first = await bitmap(await answer.blob());
    if (!current()) return;
    clip = { ...taken, first, stem: file.name.replace(/\.[^.]*$/, "") };
    resize(first.width, first.height);
    Object.assign(shown, { picture: first, ids: null });
    $("view").getContext("2d").drawImage(first, 0, 0);
    show("view", "clip");
    const frames = taken.frames ? `${taken.frames} frames` : "frames";
    say(`${file.name}: ${frames} of ${taken.width} x ${taken.height} pixels, ${taken.fps.toFixed(2)} per second.`);
  });
}

async function run(what, body) {
  const mine = clip;
  let made = false;
  await work("Queued ...", async (current) => {
    $("cancel").hidden = false;
    $("clip").hidden = $("tools").hidden = $("redraw").disabled = true;
    const hidden = what === "redraw" ? [...shown.hidden] : [];
    let at = await ask("POST", `app/${mine.id}/${what}?opacity=${opacity()}&hidden=${hidden}`, body);
    while (at.state === "waiting" || at.state === "running") {
      await new Promise((wake) => setTimeout(wake, POLL));
      at = await ask("GET", `app/${mine.id}`);
      if (!current()) return;
      if (at.state === "waiting") say(at.ahead ? `Queued: ${at.ahead} before this one.` : "Queued ...");
      else say(`Frame ${at.done}${at.total ? ` of ${at.total}` : ""}`);
      if (at.total) progress(Math.min(at.done / at.total, 0.999));
    }
    if (at.state === "failed") throw new Error(at.error);
    if (at.error) return say(at.error); // cancelled
    made = true;
    if (what !== "redraw") shown.hidden.clear();
    showClip(mine, at);
  });
  if (clip !== mine) return;
  $("clip").hidden = false;
  if (!made) $("redraw").disabled = false;
}

function showClip(of, found) {
  painter.end();
  const at = $("video").hidden ? 0 : $("video").currentTime;
  const version = Date.now(); // a second result has the same name
  $("video").src = `app/${of.id}/overlay.mp4?${version}`;
  $("video").currentTime = at;
  show("video", "clip");
  listAreas(found.areas, () => ($("redraw").disabled = false));
  $("look").hidden = $("redraw").hidden = false;
  say(`Done: ${found.done} frames.`);
  offer([
    [`app/${of.id}/overlay.mp4`, `${of.stem}_overlay.mp4`, "Download video"],
    [`app/${of.id}/masks.zip`, `${of.stem}_masks.zip`, "Download masks"],
  ]);
}

function beginPainting() {
  painter.begin(clip.first);
  show("view", "tools");
  $("look").hidden = false;
  $("size").value = brushOf(painter.size);
  tools();
  say("Paint over the object to track.");
  $("view").focus();
}

function tools() {
  $("objects").replaceChildren(
    ...Array.from({ length: painter.count }, (_, at) => {
      const chosen = !painter.erasing && painter.object === at + 1;
      const button = make("button", { type: "button", role: "radio" }, swatch(about.objects[at + 1]), `${at + 1}`);
      button.setAttribute("aria-checked", chosen);
      button.setAttribute("aria-label", `Object ${at + 1}`);
      button.onclick = () => choose(at + 1);
      return button;
    }),
  );
  $("erase").setAttribute("aria-pressed", painter.erasing);
  $("add").disabled = painter.count + 1 >= about.objects.length;
  $("size_now").value = `${Math.round(painter.size)} px`;
  painted();
}

function painted() {
  $("undo").disabled = !painter.strokes.length;
  $("follow").disabled = !painter.ids.some(Boolean);
  draw();
}

function choose(object) {
  if (object > painter.count) return;
  Object.assign(painter, { object, erasing: false });
  tools();
}

// the slider's 1..100 is a share of the picture, finer for small brushes
const longest = () => Math.max($("view").width, $("view").height);
const brushOf = (size) => Math.round(100 * Math.sqrt((2 * size) / longest()));
function brush(value) {
  painter.size = Math.max(1, ((value / 100) ** 2 * longest()) / 2);
  tools();
}

// ---- what is on the page

function resize(width, height) {
  Object.assign($("view"), { width, height });
  $("view").style.width = `min(100%, calc(70vh * ${width / height}))`; // small pictures are enlarged, too
}

function show(stage, panel) {
  $("frame").hidden = false;
  $("drop").classList.add("small");
  $("view").hidden = stage !== "view";
  $("video").hidden = stage !== "video";
  if (stage !== "video") $("video").removeAttribute("src");
  for (const id of ["clip", "tools", "result", "look"]) $(id).hidden = id !== panel;
  $("under").textContent = "";
  if (panel !== "tools") painter.end();
}

// `changed` is called when a class is switched on or off
function listAreas(areas, changed) {
  shown.changed = changed;
  $("areas").replaceChildren(
    ...areas.map(({ id, name, colour, pixels, share }) => {
      const box = make("input", { type: "checkbox", checked: !shown.hidden.has(id) });
      box.dataset.id = id;
      box.onchange = () => {
        shown.hidden[box.checked ? "delete" : "add"](id);
        changed();
      };
      const label = make("label", {}, box, swatch(colour), name);
      const cells = [label, pixels.toLocaleString("en"), (100 * share).toFixed(2)].map((what) => make("td", {}, what));
      return make("tr", {}, ...cells);
    }),
  );
  $("redraw").hidden = $("redraw").disabled = true;
  $("result").hidden = false;
}

function offer(files) {
  for (const link of $("downloads").children) URL.revokeObjectURL(link.href);
  $("downloads").replaceChildren(
    ...files.map(([href, download, text]) => make("a", { href, download, className: "button" }, text)),
  );
}

function make(kind, properties, ...inside) {
  const node = Object.assign(document.createElement(kind), properties);
  if (properties.role) node.setAttribute("role", properties.role);
  node.append(...inside);
  return node;
}

function swatch(colour) {
  const node = make("span", { className: "swatch" });
  node.style.background = `rgb(${colour})`;
  return node;
}

const opacity = () => $("opacity").value / 100;

// ---- what people do

function open(file) {
  if (!file) return;
  clip = null;
  painter.end();
  for (const id of ["result", "clip", "tools", "look"]) $(id).hidden = true;
  const video = file.type.startsWith("video/") || /\.(mp4|mov|m4v|webm|mkv|avi)$/i.test(file.name);
  (video ? openClip : openImage)(file);
}

function drops() {
  const over = (event, on) => {
    event.preventDefault();
    $("drop").classList.toggle("over", on);
  };
  document.addEventListener("dragover", (event) => over(event, true));
  document.addEventListener("dragleave", (event) => over(event, false));
  document.addEventListener("drop", (event) => {
    over(event, false);
    open(event.dataTransfer.files[0]);
  });
  $("file").onchange = () => {
    open($("file").files[0]);
    $("file").value = ""; // so that the same file can be chosen again
  };
}

function keys(event) {
  if (!painter.on || event.target.matches("input")) return;
  if (event.key >= "1" && event.key <= "9") choose(Number(event.key));
  else if (event.key === "e") $("erase").click();
  else if (event.key === "[" || event.key === "]") {
    $("size").value = Number($("size").value) + (event.key === "]" ? 4 : -4);
    brush($("size").value);
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    painter.undo();
  }
}

function pointed(event) {
  if (painter.on || !shown.ids) return;
  const box = $("view").getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * $("view").width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * $("view").height);
  $("under").textContent = about.classes[shown.ids[y * $("view").width + x]] ?? "";
}

async function begin() {
  about = await ask("GET", "app/about");
  $("about").textContent = `${about.classes.length} classes`;
  $("bounds").textContent =
    `or choose a file: images up to ${about.image_mib} MiB, videos up to ${about.video_mib} MiB and ` +
    `${about.max_seconds} s`;
  painter = new Painter($("view"), about.objects, painted);
  $("paint").hidden = !about.tracks;
  drops();
  document.addEventListener("keydown", keys);
  $("view").addEventListener("pointermove", pointed);
  $("opacity").oninput = () => {
    $("opacity_now").value = `${$("opacity").value} %`;
    if (painter.on) draw();
    else shown.changed?.();
  };
  $("opacity_now").value = "50 %";
  $("all").onclick = () => setAll(true);
  $("none").onclick = () => setAll(false);
  $("every").onclick = () => run("segment");
  $("paint").onclick = beginPainting;
  $("follow").onclick = () => run("track", painter.ids);
  $("redraw").onclick = () => run("redraw");
  $("cancel").onclick = () => ask("POST", `app/${clip.id}/cancel`).catch((error) => say(error.message, true));
  $("add").onclick = () => choose(++painter.count);
  $("erase").onclick = () => {
    painter.erasing = !painter.erasing;
    tools();
  };
  $("undo").onclick = () => painter.undo();
  $("size").oninput = () => brush($("size").value);
}

function setAll(on) {
  for (const box of $("areas").querySelectorAll("input")) {
    box.checked = on;
    shown.hidden[on ? "delete" : "add"](Number(box.dataset.id));
  }
  shown.changed();
}

begin().catch((error) => say(error.message, true));
