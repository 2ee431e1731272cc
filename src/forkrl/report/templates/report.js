"use strict";
// Tokens are hostile text: the DOM is built with textContent alone, and nothing here ever parses HTML.
(() => {
  const root = document.documentElement;
  const find = (id) => document.getElementById(id);

  const element = (tag, className = "", text = "") => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text) node.textContent = text;
    return node;
  };

  // Theme: what the system says, until the button says otherwise. A page opened from disk may have no storage.
  const stored = (value) => {
    try {
      if (value) localStorage.setItem("forkrl-theme", value);
      return localStorage.getItem("forkrl-theme");
    } catch {
      return null;
    }
  };
  const saved = stored();
  if (saved === "light" || saved === "dark") root.dataset.theme = saved;
  find("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    stored(root.dataset.theme);
  });

  const data = JSON.parse(find("fork-data").textContent);
  if (!data.views.length) return;

  // Until the new script: the compact data as the lists that this one reads.
  for (const view of data.views) for (const frame of view.frames) {
    frame.cards = frame.prompts;
    for (const card of frame.cards) for (const r of card.responses) {
      const e = r.e[0];
      r.f = r.t.map((_, i) => (r.f[i] === "1" ? 1 : 0) + 2 * (data.mark === null ? r.f[i] === "1" : e[i] >= data.mark));
      r.t = r.t.map((id) => data.texts[id]);
      r.e = e.map((x) => x === null ? null : x / 10000);
      r.l = r.t.map((_, i) => typeof r.l[i] === "number" ? r.l[i] / 10000 : null);
    }
  }

  const SELECTED = 1, FORK = 2, TOKENS_AT_ONCE = 4000, CARDS_AT_ONCE = 6;
  const state = { view: 0, frame: 0, outcome: "", now: null };
  const list = find("responses"), tip = find("tip");
  const allSelected = data.views.every((v) => v.frames.every((f) => f.cards.every((c) => c.responses.every((r) => r.f.every((x) => x & SELECTED)))));
  const tokens = new WeakMap(); // span -> [response, position]

  const colorClass = (entropy) => {
    if (entropy === null) return "eu";
    return "e" + Math.min(data.bins - 1, Math.round((Math.max(entropy, 0) / data.scale) * (data.bins - 1)));
  };

  const percent = (p) => (p > 0.9995 ? "> 99.9%" : p >= 0.001 ? (100 * p).toFixed(1) + "%" : p.toExponential(1));

  const tokenSpan = (response, index) => {
    const flags = response.f[index];
    const span = element("span", "t " + colorClass(response.e[index]), response.t[index]);
    if (flags & SELECTED && !allSelected) span.classList.add("s");
    if (flags & FORK) span.classList.add("fork");
    tokens.set(span, [response, index]);
    return span;
  };

  const factsLine = (response) => {
    const line = element("div", "facts");
    line.append(element("b", "", response.label));
    if (response.score === 1) line.append(element("span", "right", "✓ right"));
    else if (response.score === 0) line.append(element("span", "wrong", "✗ wrong"));
    else line.append(element("span", "", response.score === null ? "score not recorded" : "score " + response.score.toFixed(2)));
    if (response.reward !== null) line.append(element("span", "", "reward " + response.reward.toFixed(2)));
    if (response.advantage !== null) line.append(element("span", "", "advantage " + (response.advantage > 0 ? "+" : "") + response.advantage.toFixed(2)));
    line.append(element("span", "", response.length + " tokens, " + response.selected + " selected"));
    if (!response.finished) line.append(element("span", "wrong", "cut at the limit"));
    return line;
  };

  const responseBlock = (response) => {
    const block = element("div", "response");
    const text = element("div", "tokens");
    response.t.forEach((_, index) => text.append(tokenSpan(response, index)));
    if (response.length > response.t.length) text.append(element("span", "cut", " … " + (response.length - response.t.length) + " more tokens are not in this page"));
    block.append(factsLine(response), text);
    return block;
  };

  const cardBlock = (card) => {
    const article = element("article", "problem");
    const header = element("header");
    header.append(element("div", "prompt", card.prompt));
    if (card.outcome) header.append(element("div", "outcome " + card.outcome.split(" ")[0], card.outcome));
    const pair = element("div", "pair");
    pair.append(...card.responses.map(responseBlock));
    article.append(header, pair);
    return article;
  };

  let waiting = [];
  const showMore = () => {
    let shown = 0;
    for (let cards = 0; waiting.length && cards < CARDS_AT_ONCE && shown < TOKENS_AT_ONCE; cards++) {
      const card = waiting.shift();
      shown += card.responses.reduce((sum, r) => sum + r.t.length, 0);
      list.append(cardBlock(card));
    }
    find("more").hidden = !waiting.length;
    find("more").textContent = "Show " + waiting.length + " more";
  };

  const choice = (label, pressed, act) => {
    const button = element("button", "", label);
    button.type = "button";
    button.setAttribute("aria-pressed", String(pressed));
    button.addEventListener("click", act);
    return button;
  };

  const render = () => {
    release();
    const view = data.views[state.view], frame = view.frames[state.frame];
    find("views").replaceChildren(...data.views.map((v, i) => choice(v.title, i === state.view, () => set({ view: i, frame: 0, outcome: "" }))));
    const steps = view.frames.map((f, i) => choice(f.label, i === state.frame, () => set({ frame: i })));
    find("frames").replaceChildren(...(view.id === "training" ? [element("span", "name", "Step"), ...steps] : []));
    const outcomes = [...new Set(frame.cards.map((c) => c.outcome))].filter(Boolean).sort();
    const count = (o) => frame.cards.filter((c) => !o || c.outcome === o).length;
    find("outcomes").replaceChildren(...(outcomes.length > 1 ? ["", ...outcomes] : []).map((o) => choice((o || "all") + " " + count(o), o === state.outcome, () => set({ outcome: o }))));
    find("view-note").textContent = view.note;
    list.replaceChildren();
    waiting = frame.cards.filter((c) => !state.outcome || c.outcome === state.outcome);
    showMore();
  };

  const set = (changes) => {
    Object.assign(state, changes);
    render();
  };

  // The token in hand: its numbers beside it, and, once chosen, the keyboard's place.
  const describe = (span) => {
    const [response, index] = tokens.get(span);
    const entropy = response.e[index], logprob = response.l[index], flags = response.f[index];
    const bar = element("div", "bar"), fill = element("i");
    fill.style.width = Math.min(100, (100 * (entropy ?? 0)) / data.scale) + "%";
    bar.append(fill);
    const facts = element("dl");
    const fact = (name, value) => facts.append(element("dt", "", name), element("dd", "", value));
    fact("entropy", entropy === null ? "not a number" : entropy.toFixed(3) + " nats");
    fact("probability", logprob === null ? "not a number" : percent(Math.exp(logprob)));
    fact("position", index + 1 + " of " + response.length);
    fact("selected", flags & SELECTED ? "yes" : "no");
    tip.replaceChildren(element("div", "text", response.t[index]), bar, facts);
    tip.hidden = false;
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), root.clientWidth - tip.offsetWidth - 8);
    const below = box.bottom + 10 + tip.offsetHeight < root.clientHeight;
    tip.style.left = left + scrollX + "px";
    tip.style.top = (below ? box.bottom + 10 : box.top - 10 - tip.offsetHeight) + scrollY + "px";
  };

  const release = () => {
    state.now?.classList.remove("now");
    state.now?.removeAttribute("tabindex");
    state.now = null;
    tip.hidden = true;
  };

  const hold = (span) => {
    release();
    state.now = span;
    span.classList.add("now");
    span.tabIndex = 0;
    span.focus({ preventScroll: true });
    const box = span.getBoundingClientRect();
    if (box.top < 130 || box.bottom > root.clientHeight - 170) span.scrollIntoView({ block: "center" });
    describe(span);
  };

  const follows = (a, b) => Boolean(a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING);
  const jump = (direction) => {
    const forks = [...list.querySelectorAll(".fork")];
    const inView = (span) => span.getBoundingClientRect().bottom > 120;
    const next = state.now
      ? direction > 0 ? forks.find((f) => follows(state.now, f)) : forks.findLast((f) => follows(f, state.now))
      : direction > 0 ? forks.find(inView) : forks.findLast((f) => !inView(f));
    if (next) hold(next);
    else if (direction > 0 && waiting.length) { showMore(); jump(direction); }
  };

  const tokenAt = (event) => event.target.closest?.(".t");
  list.addEventListener("pointerover", (event) => {
    const span = tokenAt(event);
    if (span && event.pointerType === "mouse") describe(span);
  });
  list.addEventListener("pointerout", (event) => {
    if (tokenAt(event) && event.pointerType === "mouse") state.now ? describe(state.now) : (tip.hidden = true);
  });
  list.addEventListener("click", (event) => {
    const span = tokenAt(event);
    if (span) span === state.now ? release() : hold(span);
  });
  find("next").addEventListener("click", () => jump(1));
  find("previous").addEventListener("click", () => jump(-1));
  find("more").addEventListener("click", showMore);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") return release();
    const arrows = state.now || list.contains(event.target) || event.target === document.body;
    const direction = event.key === "n" || (arrows && event.key === "ArrowRight") ? 1 : event.key === "p" || (arrows && event.key === "ArrowLeft") ? -1 : 0;
    if (!direction) return;
    event.preventDefault();
    jump(direction);
  });

  addEventListener("scroll", () => {
    if (!state.now || tip.hidden) return;
    const box = state.now.getBoundingClientRect();
    if (box.bottom < 0 || box.top > root.clientHeight) tip.hidden = true;
  }, { passive: true });

  const ramp = element("span", "ramp");
  for (let bin = 0; bin < data.bins; bin++) ramp.append(element("i", "e" + bin));
  find("legend").append(element("span", "", "0"), ramp, element("span", "", "≥ " + data.scale.toFixed(1) + " nats"));
  if (!allSelected) find("legend").append(element("span", "key", "outlined: selected"));
  render();
})();
