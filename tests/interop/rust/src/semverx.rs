//! SemverX: how versions are written, which is higher, which ones a range takes, and which may replace which.
//!
//! Written after docs/reference/semverx.md, so that the test vectors are read twice, independently.

use std::cmp::Reverse;
use std::fmt::{self, Display, Formatter};

const MAX_NUMBER: u64 = (1 << 53) - 1;
const MAX_VERSION_CHARACTERS: usize = 256;
const MAX_RANGE_CHARACTERS: usize = 1024;
const MAX_ALTERNATIVES: usize = 32;
const MAX_NAME_BYTES: usize = 256;

/// How far one of a version's numbers is to be trusted, the most trusted first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum State {
    Stable,
    Legacy,
    Experimental,
}

impl State {
    const ALL: [State; 3] = [State::Stable, State::Legacy, State::Experimental];

    pub fn name(self) -> &'static str {
        match self {
            State::Stable => "stable",
            State::Legacy => "legacy",
            State::Experimental => "experimental",
        }
    }

    fn parse(word: &str) -> Option<State> {
        Self::ALL
            .into_iter()
            .find(|state| state.name().eq_ignore_ascii_case(word))
    }
}

/// One part of a pre-release. Numbers are lower than words, which are ordered by their ASCII codes.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Identifier {
    Number(u64),
    Word(String),
}

impl Display for Identifier {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Identifier::Number(number) => number.fmt(formatter),
            Identifier::Word(word) => word.fmt(formatter),
        }
    }
}

/// One version: three numbers, the state of each, and SemVer's pre-release and build.
#[derive(Clone, Debug)]
pub struct Version {
    pub numbers: [u64; 3],
    pub states: [State; 3],
    prerelease: Vec<Identifier>,
    pub build: String,
}

/// What decides which of two versions is higher: states and build do not.
#[derive(Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Precedence<'a> {
    numbers: &'a [u64],
    released: bool,
    prerelease: &'a [Identifier],
}

impl<'a> Precedence<'a> {
    fn of(numbers: &'a [u64], prerelease: &'a [Identifier]) -> Self {
        Precedence {
            numbers,
            released: prerelease.is_empty(),
            prerelease,
        }
    }
}

impl Version {
    /// Read `1.2.3-rc.1+build`, with "v" before it or not, or `1.stable.2.experimental.3.legacy`.
    pub fn parse(text: &str) -> Result<Version, String> {
        if text.chars().count() > MAX_VERSION_CHARACTERS {
            return Err(format!("has more than {MAX_VERSION_CHARACTERS} characters"));
        }
        let text = text.strip_prefix(['v', 'V']).unwrap_or(text);
        match text.split('.').collect::<Vec<_>>()[..] {
            [major, one, minor, two, patch, three] if State::parse(one).is_some() => Ok(Version {
                numbers: [number(major)?, number(minor)?, number(patch)?],
                states: [state(one)?, state(two)?, state(three)?],
                prerelease: Vec::new(),
                build: String::new(),
            }),
            _ => Self::parse_semver(text),
        }
    }

    fn parse_semver(text: &str) -> Result<Version, String> {
        let (text, build) = split(text, '+');
        let (text, prerelease) = split(text, '-');
        let numbers = match text.split('.').collect::<Vec<_>>()[..] {
            [major, minor, patch] => [number(major)?, number(minor)?, number(patch)?],
            _ => return Err(format!("has not three numbers: {text:?}")),
        };
        let prerelease = match prerelease {
            Some(text) => text.split('.').map(identifier).collect::<Result<_, _>>()?,
            None => Vec::new(),
        };
        if let Some(build) = build {
            build.split('.').try_for_each(check_word)?;
        }
        Ok(Version {
            numbers,
            states: [implied(&prerelease); 3],
            prerelease,
            build: build.unwrap_or_default().to_owned(),
        })
    }

    pub fn precedence(&self) -> Precedence<'_> {
        Precedence::of(&self.numbers, &self.prerelease)
    }

    /// The state of the whole: that of its least trusted number.
    fn state(&self) -> State {
        self.states.into_iter().max().unwrap_or(State::Stable)
    }

    pub fn prerelease(&self) -> String {
        joined(&self.prerelease)
    }

    /// Numbers and states, `1.stable.2.stable.3.stable`.
    pub fn six_parts(&self) -> String {
        let parts = self.numbers.iter().zip(self.states);
        parts
            .map(|(number, state)| format!("{number}.{}", state.name()))
            .collect::<Vec<_>>()
            .join(".")
    }
}

/// The one canonical form: SemVer's where it says everything, else six parts.
impl Display for Version {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        if self.states != [implied(&self.prerelease); 3] {
            return formatter.write_str(&self.six_parts());
        }
        formatter.write_str(&semver(&self.numbers, &self.prerelease))?;
        if self.build.is_empty() {
            return Ok(());
        }
        write!(formatter, "+{}", self.build)
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Operator {
    Equal,
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
    /// At least this, with the same major number.
    Caret,
    /// At least this, with the same major and minor number.
    Tilde,
}

impl Operator {
    /// The longer ones come first: `>=` is not `>`.
    const ALL: [(&'static str, Operator); 7] = [
        (">=", Operator::GreaterOrEqual),
        ("<=", Operator::LessOrEqual),
        (">", Operator::Greater),
        ("<", Operator::Less),
        ("=", Operator::Equal),
        ("^", Operator::Caret),
        ("~", Operator::Tilde),
    ];

    fn holds<T: Ord>(self, theirs: &T, ours: &T) -> bool {
        match self {
            Operator::Equal => theirs == ours,
            Operator::Greater => theirs > ours,
            Operator::Less => theirs < ours,
            Operator::LessOrEqual => theirs <= ours,
            Operator::GreaterOrEqual | Operator::Caret | Operator::Tilde => theirs >= ours,
        }
    }

    /// How many of the first numbers must be the same besides.
    fn kept(self) -> usize {
        match self {
            Operator::Caret => 1,
            Operator::Tilde => 2,
            _ => 0,
        }
    }
}

/// One condition of a range. Numbers that are left out, or wild, are not in `numbers`.
#[derive(Debug)]
enum Term {
    Comparison {
        operator: Operator,
        numbers: Vec<u64>,
        prerelease: Vec<Identifier>,
    },
    /// For each number the states that it may have; none stands for any.
    Pattern {
        numbers: Vec<u64>,
        states: [Vec<State>; 3],
    },
}

impl Term {
    fn parse(operator: Option<Operator>, word: &str) -> Result<Term, String> {
        if word.eq_ignore_ascii_case("latest") {
            return Self::comparison(operator, Vec::new());
        }
        let bare = word.strip_prefix(['v', 'V']);
        if bare.map_or(false, |bare| !bare.starts_with(is_digit)) {
            return Err(format!("no number follows in {word:?}"));
        }
        let parts: Vec<_> = bare.unwrap_or(word).split('.').collect();
        if let ([one, a, two, b, three, c], None | Some(Operator::Equal)) = (&parts[..], operator) {
            if !a.starts_with(is_digit) {
                return Ok(Term::Pattern {
                    numbers: wild_numbers(&[one, two, three])?,
                    states: [allowed(a)?, allowed(b)?, allowed(c)?],
                });
            }
        }
        if let Ok(version) = Version::parse(word) {
            return Ok(Term::Comparison {
                operator: operator.unwrap_or(Operator::Equal),
                numbers: version.numbers.to_vec(),
                prerelease: version.prerelease,
            });
        }
        if parts.len() > 3 {
            return Err(format!("{word:?} is no version"));
        }
        Self::comparison(operator, wild_numbers(&parts)?)
    }

    fn comparison(operator: Option<Operator>, numbers: Vec<u64>) -> Result<Term, String> {
        if operator.is_some() && numbers.is_empty() {
            return Err("an operator needs a number".to_owned());
        }
        Ok(Term::Comparison {
            operator: operator.unwrap_or(Operator::Equal),
            numbers,
            prerelease: Vec::new(),
        })
    }

    fn matches(&self, version: &Version) -> bool {
        match self {
            Term::Pattern { numbers, states } => {
                let mut pairs = states.iter().zip(&version.states);
                version.numbers.starts_with(numbers)
                    && pairs.all(|(some, state)| some.is_empty() || some.contains(state))
            }
            Term::Comparison {
                operator,
                numbers,
                prerelease,
            } => {
                let kept = operator.kept().min(numbers.len());
                let holds = if numbers.len() == 3 {
                    let ours = Precedence::of(numbers, prerelease);
                    operator.holds(&version.precedence(), &ours)
                } else {
                    operator.holds(&&version.numbers[..numbers.len()], &&numbers[..])
                };
                holds && version.numbers[..kept] == numbers[..kept]
            }
        }
    }

    /// Whether a state is asked for by name. A pre-release after `<` is what is left out, so it asks for none.
    fn names(&self, state: State) -> bool {
        match self {
            Term::Pattern { states, .. } => states.iter().any(|some| some.contains(&state)),
            Term::Comparison {
                operator,
                prerelease,
                ..
            } => {
                *operator != Operator::Less
                    && !prerelease.is_empty()
                    && implied(prerelease) == state
            }
        }
    }
}

impl Display for Term {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Term::Pattern { numbers, states } => {
                let parts = states.iter().enumerate().map(|(at, states)| {
                    let names: Vec<_> = states.iter().map(|state| state.name()).collect();
                    let number = numbers.get(at).map(u64::to_string);
                    let states = match names[..] {
                        [] => "*".to_owned(),
                        [name] => name.to_owned(),
                        _ => format!("{{{}}}", names.join("|")),
                    };
                    format!("{}.{states}", number.as_deref().unwrap_or("*"))
                });
                formatter.write_str(&parts.collect::<Vec<_>>().join("."))
            }
            Term::Comparison {
                operator,
                numbers,
                prerelease,
            } => {
                let text = semver(numbers, prerelease);
                match (operator, numbers.len()) {
                    (_, 0) => formatter.write_str("*"),
                    (Operator::Equal, 3) => formatter.write_str(&text),
                    (Operator::Equal, _) => write!(formatter, "{text}.x"),
                    _ => {
                        let sign = Operator::ALL.iter().find(|(_, one)| one == operator);
                        write!(formatter, "{}{text}", sign.map_or("", |(sign, _)| sign))
                    }
                }
            }
        }
    }
}

/// A set of versions: alternatives of which one must match, each with terms of which all must.
#[derive(Debug)]
pub struct Range(Vec<Vec<Term>>);

impl Range {
    /// Read `^1.2.0`, `>=1.0.0, <2.0.0 || 3.x`, `2.{stable|legacy}.*.stable.*.*` and the like.
    pub fn parse(text: &str) -> Result<Range, String> {
        if text.chars().count() > MAX_RANGE_CHARACTERS {
            return Err(format!("has more than {MAX_RANGE_CHARACTERS} characters"));
        }
        let alternatives: Vec<_> = text.split("||").collect();
        if alternatives.len() > MAX_ALTERNATIVES {
            return Err(format!("has more than {MAX_ALTERNATIVES} alternatives"));
        }
        let alternatives = alternatives.into_iter().map(read_terms);
        alternatives.collect::<Result<_, _>>().map(Range)
    }

    pub fn matches(&self, version: &Version) -> bool {
        let mut alternatives = self.0.iter();
        alternatives.any(|terms| terms.iter().all(|term| term.matches(version)))
    }

    /// The highest match of the stable ones, else of the legacy ones, else of the experimental ones; a state that the
    /// range names counts as much as stable. Of equal versions the most trusted, and then the first.
    pub fn best<'a>(&self, versions: &'a [Version]) -> Option<&'a Version> {
        let merit = |version: &&'a Version| {
            let state = version.state();
            let named = self.0.iter().flatten().any(|term| term.names(state));
            let rank = if named { State::Stable } else { state };
            (Reverse(rank), version.precedence(), Reverse(state))
        };
        let matches = versions.iter().filter(|version| self.matches(version));
        // The last of equals wins, so the first comes last.
        matches.rev().max_by(|one, two| merit(one).cmp(&merit(two)))
    }
}

impl Display for Range {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let alternatives = self.0.iter().map(|terms| {
            let terms: Vec<_> = terms.iter().map(Term::to_string).collect();
            terms.join(" ")
        });
        formatter.write_str(&alternatives.collect::<Vec<_>>().join(" || "))
    }
}

/// What is asked for: a name, and the range of versions that will do.
pub struct Spec {
    pub name: String,
    pub range: Range,
}

impl Spec {
    /// Read `name@range` or `@scope/name@range`; without a range, any version will do.
    pub fn parse(text: &str) -> Result<Spec, String> {
        let (name, range) = match text.rfind('@') {
            None | Some(0) => (text, "*"),
            Some(at) => (&text[..at], &text[at + 1..]),
        };
        let parts = match name.strip_prefix('@') {
            None => vec![name],
            Some(scoped) => match split(scoped, '/') {
                (scope, Some(rest)) => vec![scope, rest],
                _ => return Err("a scope without a name".to_owned()),
            },
        };
        if name.len() > MAX_NAME_BYTES {
            return Err(format!("the name has more than {MAX_NAME_BYTES} bytes"));
        }
        if parts
            .iter()
            .any(|part| part.is_empty() || part.contains(unfit_for_names))
        {
            return Err(format!("{name:?} is no name"));
        }
        Ok(Spec {
            name: name.to_owned(),
            range: Range::parse(range)?,
        })
    }
}

/// What the caller of a swap agrees to; nothing by default.
#[derive(Clone, Copy, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SwapFlags {
    pub allow_experimental: bool,
    pub validated: bool,
    pub migrate: bool,
    pub rollback: bool,
}

/// The parts of a version that keep the candidate from replacing the current one while a program runs.
pub fn unswappable(current: &Version, candidate: &Version, flags: SwapFlags) -> Vec<&'static str> {
    let same_major = current.numbers[0] == candidate.numbers[0];
    let fails = |before: State, after: State| match (before, after) {
        (_, State::Experimental) => !flags.allow_experimental,
        (_, State::Legacy) => !flags.rollback,
        (State::Stable, State::Stable) => !same_major,
        (State::Legacy, State::Stable) => !flags.migrate,
        (State::Experimental, State::Stable) => !(same_major && flags.validated),
    };
    let states = current.states.into_iter().zip(candidate.states);
    ["major", "minor", "patch"]
        .into_iter()
        .zip(states)
        .filter(|(_, (before, after))| fails(*before, *after))
        .map(|(part, _)| part)
        .collect()
}

/// The state that SemVer's spelling gives to all three numbers.
fn implied(prerelease: &[Identifier]) -> State {
    match prerelease {
        [] => State::Stable,
        [Identifier::Word(word), ..] => State::parse(word).unwrap_or(State::Experimental),
        [Identifier::Number(_), ..] => State::Experimental,
    }
}

fn split(text: &str, sign: char) -> (&str, Option<&str>) {
    match text.split_once(sign) {
        Some((before, after)) => (before, Some(after)),
        None => (text, None),
    }
}

fn is_digit(character: char) -> bool {
    character.is_ascii_digit()
}

fn number(word: &str) -> Result<u64, String> {
    let plain = !word.is_empty() && word.chars().all(is_digit);
    let canonical = plain && (word == "0" || !word.starts_with('0'));
    let number = word.parse().ok().filter(|number| *number <= MAX_NUMBER);
    number
        .filter(|_| canonical)
        .ok_or_else(|| format!("{word:?} is no number of a version"))
}

fn state(word: &str) -> Result<State, String> {
    State::parse(word).ok_or_else(|| format!("{word:?} is no state"))
}

fn check_word(word: &str) -> Result<(), String> {
    let fit = |character: char| character.is_ascii_alphanumeric() || character == '-';
    if word.is_empty() || !word.chars().all(fit) {
        return Err(format!("{word:?} is no identifier"));
    }
    Ok(())
}

fn identifier(word: &str) -> Result<Identifier, String> {
    check_word(word)?;
    if word.chars().all(is_digit) {
        number(word).map(Identifier::Number)
    } else {
        Ok(Identifier::Word(word.to_owned()))
    }
}

fn joined<T: Display>(parts: &[T]) -> String {
    let parts: Vec<_> = parts.iter().map(T::to_string).collect();
    parts.join(".")
}

fn semver(numbers: &[u64], prerelease: &[Identifier]) -> String {
    let numbers = joined(numbers);
    if prerelease.is_empty() {
        return numbers;
    }
    format!("{numbers}-{}", joined(prerelease))
}

/// Read terms with spaces between them, or one comma.
fn read_terms(text: &str) -> Result<Vec<Term>, String> {
    let mut terms = Vec::new();
    let mut rest = text.trim_start_matches(' ');
    loop {
        let operator = Operator::ALL
            .iter()
            .find(|(sign, _)| rest.starts_with(sign));
        let after = rest[operator.map_or(0, |(sign, _)| sign.len())..].trim_start_matches(' ');
        let end = after.find([' ', ',']).unwrap_or(after.len());
        if end == 0 {
            return Err("a version is missing".to_owned());
        }
        terms.push(Term::parse(operator.map(|(_, one)| *one), &after[..end])?);
        rest = after[end..].trim_start_matches(' ');
        if rest.is_empty() {
            return Ok(terms);
        }
        if let Some(more) = rest.strip_prefix(',') {
            rest = more.trim_start_matches(' ');
        }
    }
}

/// Read numbers of which the last ones may be wild, and give those that are not.
fn wild_numbers(words: &[&str]) -> Result<Vec<u64>, String> {
    let is_wild = |word: &&&str| matches!(**word, "x" | "X" | "*");
    let wild = words.iter().rev().take_while(is_wild).count();
    words[..words.len() - wild]
        .iter()
        .map(|word| number(word))
        .collect()
}

/// Read the states that one number of a pattern may have: `stable`, `{stable|legacy}`, or `*`, which gives none.
fn allowed(word: &str) -> Result<Vec<State>, String> {
    if word == "*" {
        return Ok(Vec::new());
    }
    let inner = word
        .strip_prefix('{')
        .and_then(|word| word.strip_suffix('}'));
    let words: Vec<_> = inner.map_or(vec![word], |inner| inner.split('|').collect());
    let mut states = words
        .into_iter()
        .map(state)
        .collect::<Result<Vec<_>, _>>()?;
    states.sort_unstable();
    if states.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(format!("{word:?} names a state twice"));
    }
    Ok(states)
}

/// Spaces, controls, what cannot be seen or turns text around, and "@", which divides.
fn unfit_for_names(character: char) -> bool {
    matches!(character,
        '\0'..=' ' | '@' | '\u{7f}'..='\u{a0}' | '\u{ad}' | '\u{61c}' | '\u{1680}' | '\u{180e}'
        | '\u{2000}'..='\u{200f}' | '\u{2028}'..='\u{202f}' | '\u{205f}'..='\u{206f}'
        | '\u{3000}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}
