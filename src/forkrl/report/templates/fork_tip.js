// The numbers of one token, beside it: the token in hand, or the one under the pointer.
const tip = find("tip");
let held = null, described = null; // elements
const MOST_LAYER_ROWS = 5;

const percent = (p) => (p === null ? "–" : p > 0.9995 ? "> 99.9%" : p >= 0.001 ? (100 * p).toFixed(1) + "%" : p < 1e-5 ? "< 0.001%" : (100 * p).toPrecision(1) + "%");
const inNats = (value) => (value === null ? "not a number" : value.toFixed(3) + " nats");
const onOneLine = (text) => text.replaceAll("⏎\n", "⏎");

const bar = (fraction, className = "") => {
  const track = element("div", ("bar " + className).trim()), fill = element("i");
  fill.style.width = 100 * Math.min(1, Math.max(0, fraction)) + "%";
  track.append(fill);
  return track;
};

const factsOf = (response, index) => {
  const facts = element("dl");
  const fact = (name, value) => facts.append(element("dt", "", name), element("dd", "", value));
  if (isOther(response, index)) fact("written by", "the environment or the chat template; not trained on");
  else {
    fact("entropy", inNats(entropyOf(response, index)));
    if (response.r) fact("rank", response.r[index].toLocaleString("en"));
    if (response.l.length) fact("probability", response.l[index] === null ? "not a number" : percent(probabilityOf(response, index)));
    if (response.selected !== null) fact("selected", isSelected(response, index) ? "yes" : "no");
  }
  fact("position", (index + 1).toLocaleString("en") + " of " + response.length.toLocaleString("en"));
  return facts;
};

// The entropy under every checkpoint: rows while they are few, a little chart when they are many.
const layersOf = (response, index) => {
  const names = view().layers, values = names.map((_, layer) => entropyOf(response, index, layer));
  const box = element("div", "layers");
  if (names.length <= MOST_LAYER_ROWS) {
    names.forEach((name, layer) => {
      const row = element("div", "line" + (layer === state.layer ? " current" : ""));
      row.append(element("span", "what", name), bar((values[layer] ?? 0) / data.scale), element("span", "number", values[layer] === null ? "–" : values[layer].toFixed(3)));
      box.append(row);
    });
    return box;
  }
  const chart = element("div", "columns"), ends = element("div", "ends");
  values.forEach((value, layer) => {
    const column = element("i", layer === state.layer ? "current" : "");
    column.style.height = Math.max(4, Math.min(100, (100 * (value ?? 0)) / data.scale)) + "%";
    chart.append(column);
  });
  const end = (layer) => element("span", "", names[layer] + ": " + (values[layer] === null ? "–" : values[layer].toFixed(2)));
  ends.append(end(0), end(names.length - 1));
  box.append(chart, ends);
  return box;
};

const alternativesBox = (response, index) => {
  const box = element("div", "alternatives"), found = alternativesOf(response, index);
  for (const { id, probability, rank, taken } of found) {
    const row = element("div", "line" + (taken ? " taken" : ""));
    const what = element("span", "what");
    what.append(element("span", "chip", onOneLine(data.texts[id])));
    row.append(what, bar(probability), element("span", "number", percent(probability)));
    if (taken) row.title = "written" + (rank ? ", rank " + rank : "");
    box.append(row);
  }
  const rest = 1 - found.reduce((sum, { probability }) => sum + probability, 0);
  if (rest >= 0.0005) {
    const row = element("div", "line rest");
    row.append(element("span", "what", "all others"), bar(rest), element("span", "number", percent(rest)));
    box.append(row);
  }
  return box;
};

// What became of each token tried here: the share of continuations that succeeded, its 95% interval, how many.
const branchesBox = (response, index) => {
  const box = element("div", "branches");
  box.append(element("div", "heading", "success after each token tried here"));
  for (const [id, probability, rate, low, high, count] of response.b[index]) {
    const row = element("div", "line" + (id === response.t[index] ? " taken" : "")), what = element("span", "what"), track = bar(rate ?? 0, "rate"), whisker = element("b");
    whisker.style.left = 100 * (low ?? 0) + "%";
    whisker.style.width = 100 * ((high ?? 0) - (low ?? 0)) + "%";
    track.append(whisker);
    what.append(element("span", "chip", onOneLine(data.texts[id])), " ", element("span", "chance", percent(probability)));
    const whole = (share) => (share === null ? "–" : Math.round(100 * share));
    const number = element("span", "number", whole(rate) + "%");
    number.append(element("small", "", " [" + whole(low) + ", " + whole(high) + "] of " + count));
    row.append(what, track, number);
    box.append(row);
  }
  return box;
};

// Where reading begins on the screen. On a phone only a part of the toolbar sticks to the top.
const underBar = () => Math.max(0, ...["toolbar", "controls"].map((id) => find(id).getBoundingClientRect().bottom));

// Under the token, or over it; beside it where neither has room.
const placeTip = () => {
  if (tip.hidden || !described?.isConnected) return;
  const box = described.getClientRects()[0] ?? described.getBoundingClientRect();
  const width = tip.offsetWidth, height = tip.offsetHeight, right = root.clientWidth - width - 8;
  let left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), right);
  let top = box.bottom + 10;
  if (top + height > root.clientHeight - 8) top = box.top - 10 - height;
  if (top < 8) {
    top = Math.max(8, root.clientHeight - height - 8);
    left = box.right + 14 <= right ? box.right + 14 : Math.max(8, box.left - width - 14);
  }
  tip.style.left = left + scrollX + "px";
  tip.style.top = top + scrollY + "px";
};

const describe = (span) => {
  const { card, response: number, index } = placeOf(span);
  const response = cards[card].prompt.responses[number];
  const parts = [element("div", "text", textOf(response, index)), bar((entropyOf(response, index) ?? 0) / data.scale), factsOf(response, index)];
  if (view().layers.length > 1) parts.push(layersOf(response, index));
  if (isTested(response, index)) parts.push(branchesBox(response, index));
  else if (response.w) parts.push(alternativesBox(response, index));
  tip.replaceChildren(...parts);
  tip.hidden = false;
  described = span;
  placeTip();
};

const release = () => {
  if (held) {
    held.classList.remove("now");
    held.removeAttribute("tabindex");
    held.removeAttribute("aria-describedby");
  }
  held = state.now = null;
  tip.hidden = true;
};

// Neither the toolbar nor, on a phone, the tip at the bottom may cover it.
const bringIntoSight = (span) => {
  const box = span.getBoundingClientRect();
  const floor = getComputedStyle(tip).position === "fixed" ? tip.getBoundingClientRect().top : root.clientHeight - 170;
  if (box.top < underBar() + 8 || box.bottom > floor - 8) scrollBy({ top: box.top - 0.5 * floor, behavior: "instant" });
  placeTip();
};

// What is drawn because it came near may be of another height than was reserved: look again when it is, unless the
// reader has scrolled on.
let settling = 0; // frames to go
const settle = (span) => requestAnimationFrame(() => {
  if (held !== span || settling-- <= 0) return;
  bringIntoSight(span);
  settle(span);
});
for (const kind of ["wheel", "touchstart", "pointerdown", "keydown"]) addEventListener(kind, () => (settling = 0), { passive: true, capture: true });

const hold = (place, { focus = true } = {}) => {
  release();
  const span = spanAt(place);
  state.now = place;
  held = span;
  span.classList.add("now");
  span.tabIndex = 0;
  span.setAttribute("aria-describedby", "tip");
  if (focus) span.focus({ preventScroll: true });
  describe(span);
  bringIntoSight(span);
  settling = 4;
  settle(span);
};
