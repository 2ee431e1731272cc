// What the reader can do: choose, jump, search; by button, pointer and key.
const turnTo = (card, number) => {
  release();
  card.prompt.active = number;
  showPanes(card);
};

const set = (changes) => {
  Object.assign(state, changes);
  render();
};

const setLayer = (layer) => {
  if (layer < 0 || layer >= view().layers.length || layer === state.layer) return;
  state.layer = layer;
  repaint();
  renderLayers();
  if (held) describe(held);
};

const renderLayers = () => {
  const names = view().layers;
  const buttons = names.map((name, i) => choice(name, i === state.layer, () => setLayer(i)));
  find("layers").replaceChildren(...(names.length > 1 ? [element("span", "name", "Entropy at"), ...buttons] : []));
};

const renderChoices = () => {
  const { frames, frameName } = view(), prompts = frame().prompts;
  const views = data.views.map((v, i) => choice(v.title, i === state.view, () => set({ view: i, frame: 0, layer: 0, outcome: "" })));
  find("views").replaceChildren(...(views.length > 1 ? views : []));
  const steps = frames.map((f, i) => choice(f.label, i === state.frame, () => set({ frame: i })));
  find("frames").replaceChildren(...(frames.length > 1 || frameName ? [element("span", "name", frameName), ...steps] : []));
  const outcomes = [...new Set(prompts.map((prompt) => prompt.outcome))].filter(Boolean).sort();
  const count = (outcome) => prompts.filter((prompt) => !outcome || prompt.outcome === outcome).length;
  const filters = outcomes.map((o) => choice(o + " " + count(o), o === state.outcome, () => set({ outcome: o })));
  find("outcomes").replaceChildren(...(outcomes.length > 1 ? [choice("all " + count(""), !state.outcome, () => set({ outcome: "" })), ...filters] : []));
  find("view-note").textContent = view().note;
  renderLayers();
};

const render = () => {
  release();
  renderChoices();
  const responses = frame().prompts.flatMap((prompt) => prompt.responses);
  const has = {
    layers: view().layers.length > 1,
    tabs: frame().prompts.some(isTabbed),
    tested: responses.some((response) => response.b),
    outlined: responses.some((response) => response.selected !== null),
  };
  document.querySelectorAll("[data-when]").forEach((node) => (node.hidden = !has[node.dataset.when]));
  makeCards();
  search(cards.map((card) => card.prompt), find("search").value);
  repaint();
  sayMatches();
};

// Where reading stands when nothing is in hand: the first token below the toolbar.
const topPlace = () => {
  const line = underBar();
  const card = cards.findIndex(({ node }) => node.getBoundingClientRect().bottom > line);
  if (card < 0) return null;
  fill(cards[card]);
  const pane = cards[card].panes[0];
  const block = pane.blocks.find(({ node }) => node.getBoundingClientRect().bottom > line) ?? pane.blocks.at(-1);
  draw(block);
  const first = [...block.node.children].findIndex((span) => span.getBoundingClientRect().bottom > line);
  return { card, response: pane.number, index: block.start + Math.max(0, first) };
};

const jump = (direction, wanted = isFork) => {
  const top = state.now ? null : topPlace();
  const from = state.now ?? (top && { ...top, index: top.index - (direction > 0) }); // the first token itself counts
  const next = from && nearest(cards.map((card) => card.prompt), from, direction, wanted);
  if (next) hold(next);
};

const turn = (direction) => {
  const card = cards[(state.now ?? topPlace())?.card];
  const next = (card?.prompt.active ?? 0) + direction;
  if (!card || !isTabbed(card.prompt) || next < 0 || next >= card.prompt.responses.length) return;
  turnTo(card, next);
  const { top } = card.node.getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) card.node.scrollIntoView({ block: "start" });
};

// Search: matches are found at once in all responses, and drawn only where the reader goes.
const sayMatches = () => {
  const count = state.matches.length, all = count.toLocaleString("en") + (count >= MAX_MATCHES ? "+" : "");
  const asked = find("search").value.trim();
  find("matches").textContent = !asked ? "" : !count ? "none" : state.match < 0 ? all : (state.match + 1).toLocaleString("en") + " of " + all;
};

const goToMatch = (direction) => {
  const count = state.matches.length;
  if (!count) return;
  const first = state.match < 0 && direction < 0 ? count - 1 : state.match + direction;
  state.match = (first + count) % count;
  release();
  hold(state.matches[state.match], { focus: false });
  repaint();
  sayMatches();
};

let typed = 0;
find("search").addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(lookUp, 80); // not at every letter: a page may hold a million characters
});
const lookUp = () => {
  clearTimeout(typed);
  typed = 0;
  search(cards.map((card) => card.prompt), find("search").value);
  repaint();
  sayMatches();
};
find("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    if (typed) lookUp();
    goToMatch(event.shiftKey ? -1 : 1);
  } else if (event.key === "Escape") {
    event.target.value = "";
    lookUp();
    if (held) held.focus({ preventScroll: true });
    else event.target.blur();
  } else return;
  event.preventDefault();
});

const tokenAt = (event) => event.target.closest?.(".t");
list.addEventListener("pointerover", (event) => {
  const span = tokenAt(event);
  if (span && event.pointerType === "mouse") describe(span);
});
list.addEventListener("pointerout", (event) => {
  if (!tokenAt(event) || event.pointerType !== "mouse") return;
  if (held) describe(held);
  else tip.hidden = true;
});
list.addEventListener("click", (event) => {
  const span = tokenAt(event);
  if (span) return span === held ? release() : hold(placeOf(span));
  if (!event.target.matches?.(".strip")) return;
  const block = recordOf.get(event.target.parentNode.querySelector(".block")), box = event.target.getBoundingClientRect();
  const place = { card: cards.indexOf(block.card), response: block.number, index: Math.floor(((event.clientX - box.left) / box.width) * block.response.t.length) };
  hold(nearest(cards.map((card) => card.prompt), { ...place, index: place.index - 1 }, 1, isFork) ?? place);
});

const KEYS = {
  n: () => jump(1),
  p: () => jump(-1),
  b: () => jump(1, isTested),
  B: () => jump(-1, isTested),
  j: () => turn(1),
  k: () => turn(-1),
  "]": () => setLayer(state.layer + 1),
  "[": () => setLayer(state.layer - 1),
  "/": () => find("search").select(),
  Escape: release,
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.("input")) return;
  const arrow = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const reading = held || list.contains(event.target) || event.target === document.body;
  if (arrow && reading) jump(arrow);
  else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
});

addEventListener("scroll", () => {
  if (!held || tip.hidden) return;
  const box = held.getBoundingClientRect();
  if (box.bottom < 0 || box.top > root.clientHeight) tip.hidden = true;
}, { passive: true });
root.addEventListener("recolour", repaint);
addEventListener("beforeprint", () => cards.slice(0, revealed).forEach((card) => {
  fill(card);
  for (const { blocks } of card.panes) blocks.forEach(draw);
}));

find("more").addEventListener("click", () => reveal(revealed + CARDS_AT_ONCE));
find("next").addEventListener("click", () => jump(1));
find("previous").addEventListener("click", () => jump(-1));
find("next-tested").addEventListener("click", () => jump(1, isTested));

const ramp = element("span", "ramp");
ramp.id = "ramp";
for (let bin = 0; bin < data.bins; bin++) ramp.append(element("i", "e" + bin));
find("legend").prepend(element("span", "", "0"), ramp, element("span", "", "≥ " + data.scale.toFixed(1) + " nats"));
render();
