"use strict";
// A figure opens in full when it is clicked; without this script the page works as well.
const dialog = document.getElementById("zoom");
for (const picture of document.querySelectorAll(".picture")) {
  const open = () => {
    dialog.querySelector("div").replaceChildren(picture.firstElementChild.cloneNode(true));
    dialog.showModal();
  };
  picture.tabIndex = 0;
  picture.setAttribute("role", "button");
  picture.addEventListener("click", open);
  picture.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      open();
    }
  });
}
dialog.addEventListener("click", () => dialog.close());
// One benchmark at a time has the page to itself; without this script all of them follow each other.
const sections = [...document.querySelectorAll("main > section[id]")];
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
function mark(section) {
  for (const link of links.values()) link.removeAttribute("aria-current");
  (links.get(section.id) ?? links.get("benchmarks"))?.setAttribute("aria-current", "true");
}
function route() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const page = target?.closest("section.page") ?? null;
  for (const section of sections) {
    section.hidden = page === null ? section.classList.contains("page") : section !== page;
  }
  if (page !== null) mark(page);
  if (page === target) window.scrollTo(0, 0);
  else target?.scrollIntoView();
}
// The section in view is marked in the navigation.
const observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) if (entry.isIntersecting) mark(entry.target);
  },
  { rootMargin: "-15% 0px -75% 0px" },
);
for (const section of sections) observer.observe(section);
addEventListener("hashchange", route);
route();
