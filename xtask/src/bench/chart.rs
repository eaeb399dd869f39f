//! Charts as SVG files that are read on a light and on a dark page: no background, and colours that
//! follow what the reader prefers.

pub(crate) mod bars;
pub(crate) mod curves;

/// As wide as a README's column.
const WIDTH: f64 = 760.0;
/// Above the drawing, for what it shows.
const TOP: f64 = 58.0;

/// Classes: `t`ext, what is `s`aid quietly, `l`ines; and by whom: the ambassador, nobody, others.
const STYLE: &str = "\
text{font:13px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:#1f2328}\
.title{font-size:15px;font-weight:600}.s{fill:#59636e}.end{text-anchor:end}.mid{text-anchor:middle}\
.l{stroke:#d1d9e0}.w{stroke:#1f2328;stroke-width:1.5}.bad{fill:#cf222e;font-weight:600}\
.ours{fill:#0969da}.none{fill:#8c959f}.other{fill:#d4894a}\
.c{fill:none;stroke-width:2.2;stroke-linejoin:round}.dashed{stroke-dasharray:5 4}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9198a1}.l{stroke:#3d444d}\
.w{stroke:#e6edf3}.bad{fill:#ff7b72}.ours{fill:#4493f8}.none{fill:#7d8590}.other{fill:#c9803f}}";

/// A drawing with a title and a subtitle over it.
fn framed(height: f64, title: &str, subtitle: &str, drawing: &str) -> String {
    let (title, subtitle) = (escaped(title), escaped(subtitle));
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\" aria-label=\"{title}\">\n\
         <style>{STYLE}</style>\n\
         <text class=\"title\" x=\"8\" y=\"22\">{title}</text>\n\
         <text class=\"s\" x=\"8\" y=\"42\">{subtitle}</text>\n{drawing}</svg>\n"
    )
}

fn text(class: &str, x: f64, y: f64, words: &str) -> String {
    format!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>\n", escaped(words))
}

fn line(class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) -> String {
    format!(
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>\n"
    )
}

fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

/// The class of who carried it.
fn side(subject: &str) -> &'static str {
    match subject {
        "no proxy" => "none",
        subject if subject.starts_with("ambassador") => "ours",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_cannot_break_the_drawing() {
        assert_eq!(escaped("a<b & \"c\""), "a&lt;b &amp; &quot;c&quot;");
    }
}
