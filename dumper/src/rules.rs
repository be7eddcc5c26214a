//! Rules per path: which files a restore must find, and which ones the image brings along.
//!
//! A file of rules has lines `keep GLOB`, `save GLOB` and `truncate GLOB`; the last one that fits a path decides.
//! Globs are matched against whole absolute paths: `*` and `?` do not match a slash, `**` does, `[a-z]` and
//! `[!a-z]` match one byte, and a backslash takes its special meaning from what follows.

use torpor_image::rules::Rule;

/// Which rule a path falls under.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    rules: Vec<(Vec<u8>, Rule)>,
}

/// A line that is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{why}", if *.line == 0 { String::new() } else { format!("line {line}: ") })]
pub struct RuleError {
    /// Its number, from 1; 0 if it stands for itself.
    pub line: usize,
    /// What is wrong with it.
    pub why: String,
}

impl Rules {
    /// Adds the rules of a file, after those there are.
    pub fn parse(&mut self, text: &str) -> Result<(), RuleError> {
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fail = |why: String| RuleError { line: number + 1, why };
            let (word, glob) = line
                .split_once(char::is_whitespace)
                .ok_or_else(|| fail(format!("`{line}` has no path; write `save /dev/shm/**`")))?;
            let rule = match word {
                "keep" => Rule::Keep,
                "save" => Rule::Save,
                "truncate" => Rule::Truncate,
                _ => return Err(fail(format!("`{word}` is not one of keep, save, truncate"))),
            };
            self.add(rule, glob.trim()).map_err(|e| fail(e.why))?;
        }
        Ok(())
    }

    /// Adds a rule, after those there are.
    pub fn add(&mut self, rule: Rule, glob: &str) -> Result<(), RuleError> {
        let fail = |why| Err(RuleError { line: 0, why });
        if !glob.starts_with('/') && !glob.starts_with("**") {
            return fail(format!("`{glob}` is no absolute path; begin it with `/` or `**`"));
        }
        if !closed(glob.as_bytes()) {
            return fail(format!("`{glob}` has a `[` without its `]`; write `\\[` for the character"));
        }
        self.rules.push((glob.as_bytes().to_vec(), rule));
        Ok(())
    }

    /// The rule that was given for a path, if any was.
    pub fn of(&self, path: &[u8]) -> Option<Rule> {
        self.rules.iter().rev().find(|(glob, _)| fits(glob, path)).map(|(_, rule)| *rule)
    }
}

/// Whether every class of a glob has its end.
fn closed(mut glob: &[u8]) -> bool {
    loop {
        glob = match glob {
            [] => return true,
            [b'\\', _, rest @ ..] => rest,
            [b'[', rest @ ..] => match class(rest) {
                Some((_, rest)) => rest,
                None => return false,
            },
            [_, rest @ ..] => rest,
        };
    }
}

/// A class, without its brackets, and what follows it. A `]` that comes first stands for itself.
fn class(glob: &[u8]) -> Option<(&[u8], &[u8])> {
    let first = if glob.first() == Some(&b'!') { 2 } else { 1 };
    let end = glob.iter().skip(first).position(|b| *b == b']')? + first;
    Some((&glob[..end], &glob[end + 1..]))
}

fn in_class(class: &[u8], byte: u8) -> bool {
    let (class, wanted) = class.strip_prefix(b"!").map_or((class, true), |rest| (rest, false));
    let mut rest = class;
    while let [low, after @ ..] = rest {
        let (high, after) = match after {
            [b'-', high, after @ ..] => (high, after),
            _ => (low, after),
        };
        if (low..=high).contains(&&byte) {
            return wanted;
        }
        rest = after;
    }
    !wanted
}

/// What is left of a glob and of a text.
type Rest<'a> = (&'a [u8], &'a [u8]);

/// Whether a glob fits all of a text. Goes back to the last star only: what an earlier one could take instead, the
/// last one can too, unless it may not take a slash; hence a place to go back to for each of the two kinds.
fn fits(glob: &[u8], text: &[u8]) -> bool {
    let (mut g, mut t) = (glob, text);
    let (mut star, mut stars): (Option<Rest<'_>>, Option<Rest<'_>>) = (None, None);
    loop {
        let next = match (g, t) {
            ([b'*', b'*', rest @ ..], _) => {
                (star, stars) = (None, Some((rest, t)));
                Some((rest, t))
            }
            ([b'*', rest @ ..], _) => {
                star = Some((rest, t));
                Some((rest, t))
            }
            ([], []) => return true,
            ([b'?', rest @ ..], [byte, after @ ..]) if *byte != b'/' => Some((rest, after)),
            ([b'[', rest @ ..], [byte, after @ ..]) if *byte != b'/' => {
                class(rest).filter(|(class, _)| in_class(class, *byte)).map(|(_, rest)| (rest, after))
            }
            ([b'\\', escaped, rest @ ..], [byte, after @ ..]) if escaped == byte => Some((rest, after)),
            ([plain, rest @ ..], [byte, after @ ..])
                if plain == byte && !matches!(plain, b'?' | b'[' | b'\\') =>
            {
                Some((rest, after))
            }
            _ => None,
        };
        (g, t) = match next {
            Some(next) => next,
            None => match (star, stars) {
                (Some((rest, [byte, after @ ..])), _) if *byte != b'/' => {
                    star = Some((rest, after));
                    (rest, after)
                }
                (_, Some((rest, [_, after @ ..]))) => {
                    (star, stars) = (None, Some((rest, after)));
                    (rest, after)
                }
                _ => return false,
            },
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        let cases: &[(&str, &str, bool)] = &[
            ("/a/b", "/a/b", true),
            ("/a/b", "/a/bc", false),
            ("/a/*", "/a/b", true),
            ("/a/*", "/a/", true),
            ("/a/*", "/a/b/c", false),
            ("/a/**", "/a/b/c", true),
            ("**", "/any/thing", true),
            ("**/*.log", "/x/y/z.log", true),
            ("**/*.log", "/x/y.log/z", false),
            ("/*/x*y", "/q/xayby", true),
            ("/*/x*y", "/q/xay/y", false),
            ("/a/**/d*e/*.c", "/a/dxe/d1/due/f.c", true),
            ("/a/**/d*e/*.c", "/a/dxe/d1/due/f.h", false),
            ("/a?c", "/abc", true),
            ("/a?c", "/a/c", false),
            ("/[a-c]x", "/bx", true),
            ("/[!a-c]x", "/bx", false),
            ("/[]-]x", "/]x", true),
            ("/[x-]y", "/-y", true),
            ("/\\*", "/*", true),
            ("/\\*", "/x", false),
            ("/\\", "/\\", false),
            ("/a*", "/a\u{fc}", true),
            ("", "", true),
        ];
        for (glob, path, wanted) in cases {
            assert_eq!(fits(glob.as_bytes(), path.as_bytes()), *wanted, "{glob} {path}");
        }
    }

    #[test]
    fn many_stars_take_no_exponential_time() {
        let glob = "/**a".repeat(40) + "b";
        assert!(!fits(glob.as_bytes(), "/a".repeat(2000).as_bytes()));
        assert!(!fits(("/".to_owned() + &"*a".repeat(40) + "b").as_bytes(), "/".to_owned().as_bytes()));
    }

    #[test]
    fn the_last_rule_decides() {
        let mut rules = Rules::default();
        rules.parse("# logs\nsave /var/**\n\n  truncate  /var/*.log \nkeep /var/a.log").expect("rules");
        assert_eq!(rules.of(b"/var/x/y"), Some(Rule::Save));
        assert_eq!(rules.of(b"/var/b.log"), Some(Rule::Truncate));
        assert_eq!(rules.of(b"/var/a.log"), Some(Rule::Keep));
        assert_eq!(rules.of(b"/etc/a"), None);
    }

    #[test]
    fn errors_name_line_and_remedy() {
        let error = |text: &str| Rules::default().parse(text).expect_err(text).to_string();
        assert_eq!(error("keep /a\nsvae /b"), "line 2: `svae` is not one of keep, save, truncate");
        assert_eq!(error("save"), "line 1: `save` has no path; write `save /dev/shm/**`");
        assert_eq!(error("\n\nsave a"), "line 3: `a` is no absolute path; begin it with `/` or `**`");
        assert!(error("save /a[b").starts_with("line 1: `/a[b` has a `[` without its `]`"));
        let error = Rules::default().add(Rule::Save, "x").expect_err("no path");
        assert_eq!(error.to_string(), "`x` is no absolute path; begin it with `/` or `**`");
    }
}
