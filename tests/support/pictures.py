"""What pictures inside of a page must keep to."""

import re


def assert_pictures_belong(html: str, count: int) -> None:
    """So many pictures, with ids of their own and the page's colours and font."""
    assert html.count("<svg") == count
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([\w-]+)', html)) <= set(ids)
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", pictures) == [] and "font-family" not in pictures
    style = html[html.index("<style>") : html.index("</style>")]
    assert all(f"{name}:" in style for name in set(re.findall(r"var\((--[\w-]+)\)", html)))
