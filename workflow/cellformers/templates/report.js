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
// The section in view is marked in the navigation.
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
const observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    }
  },
  { rootMargin: "-15% 0px -75% 0px" },
);
for (const section of document.querySelectorAll("main > section[id]")) observer.observe(section);
