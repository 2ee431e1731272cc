// Drawing. A few prompts have their cards in the page at first, each an empty box of about the right height, and more
// come on request; what a box holds is drawn when it comes near the screen, or when a jump needs it. A response is drawn in blocks of a few hundred
// tokens, and blocks out of sight cost no layout (content-visibility): length does not slow the page down.
const BLOCK_TOKENS = 250, BLOCK_MOST = 600, NEAR = "1200px 0px";
const CHARACTER_WIDTH = 9.9, LINE_HEIGHT = 31.8, LONG_RESPONSE = 500; // pixels of .tokens; they need only be about right
const list = find("responses");
let cards = [], revealed = 0; // cards in the page: the first so many
const CARDS_AT_ONCE = 12;
const near = new Set(); // blocks
const recordOf = new WeakMap(); // element -> its card or block

const colorClass = (value) => {
  if (value === null) return "eu";
  return "e" + Math.min(data.bins - 1, Math.round((Math.max(value, 0) / PER_NAT / data.scale) * (data.bins - 1)));
};

// A block ends after a line break where one comes in time, so that the break between blocks is one of the text.
const blockStarts = (response) => {
  if (response.starts) return response.starts;
  const starts = [0];
  for (let i = 1; i < response.t.length; i++) {
    const count = i - starts.at(-1);
    const atLineEnd = count >= BLOCK_TOKENS && textOf(response, i - 1).endsWith("\n");
    const atWord = count >= BLOCK_MOST && textOf(response, i).startsWith(" ");
    if (response.t.length > BLOCK_MOST && (atLineEnd || atWord || count >= 1.2 * BLOCK_MOST)) starts.push(i);
  }
  return (response.starts = starts);
};

const heightOf = (response, start, end, width) => {
  const columns = Math.max(10, Math.floor(width / CHARACTER_WIDTH));
  let lines = 0, column = 0;
  for (let i = start; i < end; i++) {
    const text = textOf(response, i);
    column += text.length;
    if (text.endsWith("\n")) {
      lines += Math.max(1, Math.ceil(column / columns));
      column = 0;
    }
  }
  return LINE_HEIGHT * (lines + Math.ceil(column / columns));
};

const paneWidth = (prompt) => {
  const beside = !isTabbed(prompt) && list.clientWidth > 780 ? prompt.responses.length : 1;
  return list.clientWidth / beside - 34;
};

// An empty box of a given height becomes a drawn one: its height is then its own, and remembered while out of sight.
const reserve = (node, height) => {
  node.style.minHeight = height + "px";
  node.style.containIntrinsicSize = "auto " + height + "px";
};

const paint = (block) => {
  const { response, start, node } = block, entropy = response.e[state.layer];
  const marked = new Uint8Array(node.children.length), current = state.matches[state.match];
  for (const hit of state.hits.get(response) ?? []) {
    const from = Math.max(0, hit.index - start), to = Math.min(marked.length, hit.end - start);
    if (from < to) marked.fill(hit === current ? 2 : 1, from, to);
  }
  [...node.children].forEach((span, k) => {
    const index = start + k;
    let name = "t " + (isOther(response, index) ? "other" : colorClass(entropy[index]));
    if (isOther(response, index) && !isOther(response, index - 1)) name += " first";
    if (isSelected(response, index)) name += /^ \S{1,24}$/.test(textOf(response, index)) ? " s lead" : " s";
    if (isFork(response, index)) name += " fork";
    if (isTested(response, index)) name += " tested";
    if (marked[k]) name += marked[k] === 2 ? " hit found" : " found";
    if (span === held) name += " now";
    span.className = name;
  });
  block.stamp = state.stamp;
};

const draw = (block) => {
  if (block.drawn) return;
  const { response, start, end, node } = block;
  for (let i = start; i < end; i++) {
    const text = textOf(response, i), broken = text.endsWith("\n");
    node.append(element("span", "", broken ? text.slice(0, -1) : text));
    if (broken) node.append("\n"); // outside the token: its box would go on in the next line
  }
  node.style.minHeight = "";
  block.drawn = true;
  paint(block);
};

const repaint = () => {
  state.stamp++;
  for (const block of near) if (block.drawn) paint(block);
  for (const card of cards) if (card.drawn) card.panes.forEach(({ strip, response }) => strip && drawStrip(strip, response));
};

const factsLine = (response) => {
  const line = element("div", "facts");
  const fact = (text, className = "") => line.append(element("span", className, text));
  line.append(element("b", "", response.label));
  if (response.score === 1) fact("✓ right", "right");
  else if (response.score === 0) fact("✗ wrong", "wrong");
  else if (response.score !== null) fact("score " + response.score.toFixed(2));
  if (response.reward !== null) fact("reward " + response.reward.toFixed(2));
  if (response.advantage !== null) fact("advantage " + (response.advantage > 0 ? "+" : "") + response.advantage.toFixed(2));
  fact((response.length - (response.others ?? 0)).toLocaleString("en") + " tokens" + (response.others ? " of the model, " + response.others.toLocaleString("en") + " of the environment" : "") + (response.selected === null ? "" : ", " + response.selected.toLocaleString("en") + " selected"));
  if (response.finished === false) fact("cut at the limit", "wrong");
  return line;
};

// A strip over a long response: the mean entropy of each stretch of it, the highest in the last colour; to be clicked.
const drawStrip = (strip, response) => {
  const colors = [...find("ramp").children].map((bin) => getComputedStyle(bin).backgroundColor);
  const entropy = response.e[state.layer], width = strip.width, brush = strip.getContext("2d");
  const means = Array.from({ length: width }, (_, x) => {
    const stretch = entropy.slice(Math.floor((x * entropy.length) / width), Math.ceil(((x + 1) * entropy.length) / width));
    return stretch.reduce((sum, value) => sum + Math.max(0, value), 0) / stretch.length;
  });
  const most = Math.max(...means, 1);
  brush.clearRect(0, 0, width, strip.height);
  means.forEach((mean, x) => {
    brush.fillStyle = colors[Math.round((mean / most) * (data.bins - 1))];
    brush.fillRect(x, 0, 1, strip.height);
  });
};

const makePane = (card, number) => {
  const response = card.prompt.responses[number], width = paneWidth(card.prompt);
  const node = element("div", "response"), text = element("div", "tokens");
  const pane = { node, number, response, blocks: [], strip: null };
  node.append(factsLine(response));
  if (response.t.length >= LONG_RESPONSE) {
    pane.strip = element("canvas", "strip");
    pane.strip.title = "Mean entropy from the first token to the last; click to go there";
    pane.strip.width = Math.max(100, Math.min(Math.round(response.t.length / 4), Math.round(width / 3)));
    pane.strip.height = 1;
    pane.strip.setAttribute("aria-hidden", "true"); // the keys reach every fork that it shows
    drawStrip(pane.strip, response);
    node.append(pane.strip);
  }
  const starts = blockStarts(response);
  let above = 0; // what stands on the first screen is drawn at once, so that the page never opens empty
  starts.forEach((start, i) => {
    const end = starts[i + 1] ?? response.t.length, block = { card, number, response, start, end, node: element("div", "block"), drawn: false, stamp: -1 };
    const height = heightOf(response, start, end, width);
    reserve(block.node, height);
    recordOf.set(block.node, block);
    pane.blocks.push(block);
    if (above < innerHeight) draw(block);
    above += height;
    text.append(block.node);
    arrivals.observe(block.node);
  });
  if (response.length > response.t.length) text.append(element("span", "cut", "… " + (response.length - response.t.length).toLocaleString("en") + " more tokens are not in this page"));
  node.append(text);
  return pane;
};

const tabLabel = (response, number) => number + 1 + (response.score === 1 ? " ✓" : response.score === 0 ? " ✗" : response.score === null ? "" : " " + response.score.toFixed(2));

const showPanes = (card) => {
  const { prompt, node } = card;
  for (const pane of card.panes) for (const block of pane.blocks) {
    arrivals.unobserve(block.node);
    near.delete(block);
  }
  card.panes = responsesInSight(prompt).map((number) => makePane(card, number));
  node.querySelector(".pair").replaceChildren(...card.panes.map((pane) => pane.node));
  node.querySelectorAll(".tabs button").forEach((tab, i) => tab.setAttribute("aria-pressed", String(i === (prompt.active ?? 0))));
};

const fill = (card) => {
  if (card.drawn) return;
  const { prompt, node } = card, header = element("header");
  card.drawn = true;
  header.append(element("div", "prompt", prompt.prompt));
  if (prompt.outcome) header.append(element("div", "outcome " + prompt.outcome.split(" ")[0], prompt.outcome));
  node.append(header);
  if (isTabbed(prompt)) {
    const tabs = element("div", "tabs choices small");
    tabs.setAttribute("role", "group");
    tabs.setAttribute("aria-label", "Responses to this prompt");
    tabs.append(...prompt.responses.map((response, i) => choice(tabLabel(response, i), false, () => turnTo(card, i), response.label)));
    [...tabs.children].forEach((tab, i) => tab.classList.add({ 1: "right", 0: "wrong" }[prompt.responses[i].score] ?? "open"));
    node.append(tabs);
  }
  node.append(element("div", "pair"));
  node.style.minHeight = "";
  showPanes(card);
};

const makeCard = (prompt) => {
  const card = { prompt, node: element("article", "problem"), drawn: false, panes: [] };
  const width = paneWidth(prompt);
  const heights = responsesInSight(prompt).map((i) => heightOf(prompt.responses[i], 0, prompt.responses[i].t.length, width));
  reserve(card.node, 120 + (list.clientWidth > 780 ? Math.max(...heights) : heights.reduce((sum, height) => sum + height, 0)));
  recordOf.set(card.node, card);
  return card;
};

const arrivals = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const record = recordOf.get(target);
    if (record.prompt) {
      if (isIntersecting) fill(record);
      continue;
    }
    if (isIntersecting) near.add(record);
    else near.delete(record);
    if (isIntersecting && !record.drawn) draw(record);
    if (isIntersecting && record.stamp !== state.stamp) paint(record);
  }
  placeTip(); // what was drawn above may have moved the token in hand
}, { rootMargin: NEAR });

const makeCards = () => {
  arrivals.disconnect();
  near.clear();
  cards = promptsShown().map(makeCard);
  let above = 0;
  for (const card of cards.slice(0, CARDS_AT_ONCE)) {
    if (above >= innerHeight) break;
    fill(card);
    above += 200;
  }
  list.replaceChildren();
  revealed = 0;
  reveal(CARDS_AT_ONCE);
};

// Some cards at a time, on request: what stands below them on the page must stay within reach.
const reveal = (count) => {
  for (const card of cards.slice(revealed, count)) {
    list.append(card.node);
    arrivals.observe(card.node);
  }
  revealed = Math.min(Math.max(revealed, count), cards.length);
  find("more").hidden = revealed === cards.length;
  find("more").textContent = "Show " + Math.min(CARDS_AT_ONCE, cards.length - revealed) + " more of " + (cards.length - revealed).toLocaleString("en");
};

// The element of a token, drawn if it was not; null once its card is gone.
const spanAt = (place) => {
  const card = cards[place.card];
  if (place.card >= revealed) reveal(place.card + 1);
  fill(card);
  if (!responsesInSight(card.prompt).includes(place.response)) turnTo(card, place.response);
  const block = card.panes.find((pane) => pane.number === place.response).blocks.findLast((each) => each.start <= place.index);
  draw(block);
  if (block.stamp !== state.stamp) paint(block);
  return block.node.children[place.index - block.start];
};

const placeOf = (span) => {
  const block = recordOf.get(span.parentNode);
  const index = block.start + Array.prototype.indexOf.call(block.node.children, span);
  return { card: cards.indexOf(block.card), response: block.number, index };
};
