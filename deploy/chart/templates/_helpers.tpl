{{- define "bellows.labels" -}}
app.kubernetes.io/name: bellows
{{- end }}

{{- define "bellows.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- /* The agent, as the API server knows it. */}}
{{- define "bellows.username" -}}
system:serviceaccount:{{ .Release.Namespace }}:agent
{{- end }}

{{- define "bellows.acts" -}}
{{- if eq .Values.mode "Act" }}true{{ end -}}
{{- end }}
