// The page's own parts: helpers that build elements, and the theme.
// Tokens are hostile text: the DOM is built with textContent alone, and nothing here ever parses HTML.
const root = document.documentElement;
const find = (id) => document.getElementById(id);

const element = (tag, className = "", text = "") => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
};

const choice = (label, pressed, act, title = "") => {
  const button = element("button", "", label);
  button.type = "button";
  button.setAttribute("aria-pressed", String(pressed));
  if (title) button.title = title;
  button.addEventListener("click", act);
  return button;
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
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const saved = stored();
if (saved === "light" || saved === "dark") root.dataset.theme = saved;
find("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches;
  root.dataset.theme = dark ? "light" : "dark";
  stored(root.dataset.theme);
  root.dispatchEvent(new Event("recolour"));
});
systemIsDark.addEventListener("change", () => root.dispatchEvent(new Event("recolour")));
